# SPDX-License-Identifier: Apache-2.0
"""Tiny models that are wide enough for every format of quantised weights."""

from __future__ import annotations

import torch
from tiny_models import make_model

WIDE = {"hidden_size": 128, "head_dim": 16}  # int4 needs a multiple of 128


def wide_model(family: str = "llama", seed: int = 0, **config):
    """tiny_models.make_model, but wide enough."""
    return make_model(family, seed, sizes=WIDE, **config)


def same_bits(a: dict, b: dict) -> bool:
    """Whether two state dicts hold the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )
