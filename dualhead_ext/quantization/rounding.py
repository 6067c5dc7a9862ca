# SPDX-License-Identifier: Apache-2.0
"""Quantisation with little error: the choice of the scale, and rounding with error feedback. It is
independent of the format, which provides its factors and its rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Added to the diagonal of the second moment, as a share of its mean: GPTQ's own value. Without it,
# errors in a direction that no calibration state has would be unlimited.
_DAMPING = 0.01
# Inputs whose feedback is added one by one; the inputs after a block get it in one product.
_BLOCK = 128
# Elements processed at once: a few copies of them fit into a core's cache, or, with feedback, make
# the products large enough.
_AT_ONCE, _AT_ONCE_WITH_FEEDBACK = 2**18, 2**25


def rows_at_a_time(d: int, factor: Tensor | None) -> int:
    """The number of rows of d inputs to process together."""
    return max(1, (_AT_ONCE if factor is None else _AT_ONCE_WITH_FEEDBACK) // d)


def best_scale(
    groups: Tensor,
    largest: float,
    factors: tuple[float, ...],
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """The scale (R, G, 1) of each group (R, G, n), fp32: max |W| / largest times the factor with
    the least ``sum (s nearest(W / s) - W)^2``; ties go to the first. 1 for a group of zeros; NaN or
    infinite for a group that is not finite.
    """
    base = groups.abs().amax(-1, keepdim=True) / largest
    # Division by a scale below the smallest normal number would overflow.
    tiny = torch.finfo(torch.float32).tiny / min(abs(factor) for factor in factors)
    base = torch.where(base < tiny, torch.ones_like(base), base)
    if len(factors) == 1:
        return base * factors[0]
    best = error = None
    for factor in factors:
        scale = base * factor
        off = nearest(groups / scale).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        if best is None:
            best, error = scale, off
        else:
            better = off < error
            best, error = torch.where(better, scale, best), torch.where(better, off, error)
    return best


def feedback_factor(hidden: Tensor) -> Tensor:
    """U (d, d) fp32, upper triangular, from hidden states (N, d): H^-1 = U^T U, where H is their
    second moment mean h h^T with 1 % of its mean diagonal added to the diagonal.

    Row i of U gives the best correction of the inputs after i for an error in input i. Computed in
    float64, since similar hidden states make H ill-conditioned.
    """
    d = hidden.shape[-1]
    second = torch.zeros(d, d, dtype=torch.float64, device=hidden.device)
    for part in hidden.split(4096):  # a copy of all in float64 could be gigabytes
        second.addmm_(part.double().T, part.double(), alpha=1 / len(hidden))
    second.diagonal().add_(_DAMPING * second.diagonal().mean().clamp(min=1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    return torch.linalg.cholesky(inverse, upper=True).float()


def round_with_feedback(
    rows: Tensor, scale: Tensor, factor: Tensor, nearest: Callable[[Tensor], Tensor]
) -> Tensor:
    """Values q (R, d) for rows (R, d) fp32 and scale (R, G) that keep ``E |(W - s q) h|^2`` small,
    not ``|W - s q|^2``.

    The inputs are rounded to the nearest value one after the other. The error e of input i then
    moves each later input j by ``-e U[i, j] / U[i, i]``, the least-squares compensation under the
    second moment of ``factor`` (Frantar et al. 2023, GPTQ, with scales that are fixed before).
    """
    d = rows.shape[1]
    inputs = rows.T.contiguous()  # so that each input is contiguous
    scales = scale.T.contiguous()
    numbers = torch.empty_like(inputs)
    for start in range(0, d, _BLOCK):
        end = min(start + _BLOCK, d)
        errors = torch.empty_like(inputs[start:end])
        for i in range(start, end):
            s = scales[i * scales.shape[0] // d]
            numbers[i] = nearest(inputs[i] / s)
            errors[i - start] = (inputs[i] - numbers[i] * s) / factor[i, i]
            inputs[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
        inputs[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return numbers.T.contiguous()
