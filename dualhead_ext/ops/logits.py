# SPDX-License-Identifier: Apache-2.0
"""Logits outside of the operators: the dtype that they have, and the backbone's own function of
them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, alpha and log-probabilities: float64 for float64, fp32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def postprocess(logits: Tensor, logit_scale: float = 1.0, logit_softcap: float = 0.0) -> Tensor:
    """The backbone's own f: ``cap(logit_scale * z)``, ``cap(z) = c tanh(z / c)``; c = 0 means no
    cap.
    """
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcap > 0.0:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    return logits
