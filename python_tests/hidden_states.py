# SPDX-License-Identifier: Apache-2.0
"""Hidden states like those of a trained model."""

from __future__ import annotations

import torch


def hidden_states(count: int, d: int) -> torch.Tensor:
    """Hidden states that resemble each other like a backbone's.

    They are made of a few directions, a mean, and a little noise in every direction.
    """
    generator = torch.Generator().manual_seed(5)
    few = torch.randn(count, 12, generator=generator) @ torch.randn(12, d, generator=generator)
    return few + 0.1 * torch.randn(count, d, generator=generator) + 2.0
