# SPDX-License-Identifier: Apache-2.0
"""Logits outside the operators: their dtype, and the backbone's post-processing."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, alpha and log-probabilities: float64 for float64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def postprocess(logits: Tensor, logit_scale: float = 1.0, logit_softcap: float = 0.0) -> Tensor:
    """The backbone's f(z) = ``cap(logit_scale * z)``, ``cap(z) = c tanh(z / c)``; c = 0: no cap."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcap > 0.0:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    return logits
