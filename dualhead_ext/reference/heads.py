# SPDX-License-Identifier: Apache-2.0
"""The LM head and the reward heads in plain PyTorch; a part of :mod:`dualhead_ext.reference`, which
defines the dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization import dequantize


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, alpha and log-probabilities: float64 for float64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """``W h + b``: hidden (..., d), weight (V, d), bias (V,) -> (..., V) in fp32 or float64.

    With ``scale`` the weight is quantised: W is its dequantised value, and products are fp32.
    """
    if scale is not None:
        dtype = accumulator_dtype(hidden.dtype)
        hidden, weight = hidden.to(dtype), dequantize(weight, scale, dtype)
        bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden, weight, bias)
    return logits.to(accumulator_dtype(logits.dtype))


def weighted_sum(terms: list[Tensor], objective_weights: Tensor | None) -> Tensor:
    """``sum_k w_k x_k``: K terms (B, ..., n), objective_weights (B, K), or None for 1/K each."""
    if objective_weights is None:
        return terms[0] if len(terms) == 1 else torch.stack(terms).mean(0)
    total = torch.zeros_like(terms[0])
    for k, term in enumerate(terms):
        w_k = objective_weights[:, k].to(term.dtype)
        total = total + w_k.view(-1, *(1,) * (term.dim() - 1)) * term
    return total


def reward_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    objective_weights: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    """``z_RM = sum_k w_k (W_RM,k h + b_k)``.

    hidden (B, ..., d), weight (K, V, d), bias (K, V), objective_weights (B, K), where None means
    1/K each; scale (K, V, ...) of quantised weights. Returns (B, ..., V).
    """
    terms = []
    for k in range(weight.shape[0]):
        b_k = None if bias is None else bias[k]
        terms.append(head_logits(hidden, weight[k], b_k, None if scale is None else scale[k]))
    return weighted_sum(terms, objective_weights)


def correction(
    hidden: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor,
    objective_weights: Tensor | None = None,
) -> Tensor:
    """``sum_k w_k (U_k D_k h + c_k)``: for ``reward_head="embedding"`` the change of the hidden
    state (n = d), for ``"lowrank"`` delta itself (n = V).

    hidden (B, ..., d), down (K, r, d) and up (K, n, r), both None for rank 0, bias (K, n),
    objective_weights (B, K), where None means 1/K each. Returns (B, ..., n) in fp32 or float64.
    """
    terms = []
    for k in range(bias.shape[0]):
        c_k = bias[k].to(accumulator_dtype(hidden.dtype)).expand(*hidden.shape[:-1], -1)
        terms.append(c_k if down is None else c_k + F.linear(F.linear(hidden, down[k]), up[k]))
    return weighted_sum(terms, objective_weights)


def corrected_logits(
    hidden: Tensor,
    z_lm: Tensor,
    reward_head: str,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor,
    objective_weights: Tensor | None,
    lm_weight: Tensor,
    lm_scale: Tensor | None = None,
) -> Tensor:
    """``z_RM = z_LM + delta`` of a correction: delta = W_LM (M h + c) for ``"embedding"``, B A h +
    b for ``"lowrank"``. z_lm (B, ..., V); other shapes as in :func:`correction`. Returns
    (B, ..., V).
    """
    change = correction(hidden, down, up, bias, objective_weights)
    if reward_head == "embedding":
        change = head_logits(change.to(hidden.dtype), lm_weight, None, lm_scale)
    return z_lm + change


def move_hidden(hidden: Tensor, change: Tensor, alpha: Tensor) -> Tensor:
    """``h + a (M h + c)`` in the dtype of ``hidden``. The logits mix of an "embedding" head is then
    one product, ``z = W_LM (h + a (M h + c)) + b_LM``. alpha 0 gives h itself, even if the change
    is not finite. hidden, change (..., d), alpha (...).
    """
    a = alpha.unsqueeze(-1).to(change.dtype)
    moved = (hidden.to(change.dtype) + a * change).to(hidden.dtype)
    return torch.where(a == 0, hidden, moved)


def token_rewards(
    hidden: Tensor,
    labels: Tensor,
    lm_weight: Tensor,
    lm_bias: Tensor | None = None,
    *,
    reward_head: str = "full",
    reward_weight: Tensor | None = None,
    reward_down: Tensor | None = None,
    reward_up: Tensor | None = None,
    reward_bias: Tensor | None = None,
) -> Tensor:
    """``delta_k,t[y_t] = z_k,t[y_t] - z_LM,t[y_t]`` at each label y_t, under each objective, from
    the logits of the whole vocabulary.

    Args:
        hidden: (..., d). labels: (...) int64. lm_weight, lm_bias: (V, d), (V,).
        reward_weight: (K, V, d), "full" only. reward_down, reward_up: down and up of
            :func:`correction`.
        reward_bias: (K, n), or None for "full".
    Returns: (K, ...) in fp32 or float64.
    """
    dtype = accumulator_dtype(hidden.dtype)
    h, lm_weight = hidden.to(dtype), lm_weight.to(dtype)
    z_lm = head_logits(h, lm_weight, None if lm_bias is None else lm_bias.to(dtype))
    count = (reward_weight if reward_head == "full" else reward_bias).shape[0]
    found = []
    for k in range(count):
        down, up, bias = (
            None if x is None else x[k, None].to(dtype)
            for x in (reward_down, reward_up, reward_bias)
        )
        if reward_head == "full":
            z_k = reward_logits(h, reward_weight[k, None].to(dtype), bias, None)
        else:
            z_k = corrected_logits(h, z_lm, reward_head, down, up, bias, None, lm_weight)
        found.append((z_k - z_lm).gather(-1, labels[..., None]).squeeze(-1))
    return torch.stack(found)
