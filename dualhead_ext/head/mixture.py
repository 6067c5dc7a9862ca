# SPDX-License-Identifier: Apache-2.0
"""The two heads, alpha and the mixture in PyTorch, for whole sequences and for prompts.

The formulas are those of :mod:`dualhead_ext.reference`. That module shares no code with this one,
so each can check the other. Dimensions: B batch, d hidden, V vocabulary, K objectives.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.logits import accumulator_dtype, postprocess
from ..quantization import dequantize
from .controls import Controls


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
    # For a slice of positions PyTorch would copy the weight B times in bf16.
    logits = F.linear(hidden.contiguous(), weight, bias)
    return logits.to(accumulator_dtype(logits.dtype))


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
    count = weight.shape[0]
    products = (
        head_logits(hidden, weight[k], *(None if x is None else x[k] for x in (bias, scale)))
        for k in range(count)
    )
    return weighted_sum(products, count, objective_weights)


def weighted_sum(
    values: Iterable[Tensor], num_objectives: int, objective_weights: Tensor | None
) -> Tensor:
    """``sum_k w_k value_k`` of K tensors (B, ...); objective_weights (B, K), None: 1/K each."""
    total = None
    for k, value in enumerate(values):
        if objective_weights is not None:
            share = objective_weights[:, k].to(value.dtype)
            value = value * share.view(-1, *(1,) * (value.dim() - 1))
        elif num_objectives > 1:
            value = value / num_objectives
        total = value if total is None else total + value
    return total


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
    dtype, num_objectives = accumulator_dtype(hidden.dtype), bias.shape[0]

    def change(k: int) -> Tensor:
        value = bias[k].to(dtype).expand(*hidden.shape[:-1], -1)
        if down is None:
            return value
        return F.linear(F.linear(hidden.contiguous(), down[k]), up[k]).to(dtype) + value

    return weighted_sum(map(change, range(num_objectives)), num_objectives, objective_weights)


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
    """``delta_k,t[y_t]``, the entry of z_RM - z_LM at each label y_t, under each objective. Only
    the rows of these tokens are read; there is no product with the vocabulary.

    ``"full"``: (W_RM,k - W_LM)[y].h + (b_RM,k - b_LM)[y]; ``"embedding"``: W_LM[y].(M_k h + c_k);
    ``"lowrank"``: B_k[y].(A_k h) + b_k[y].

    Args:
        hidden: (..., d). labels: (...) int64. lm_weight, lm_bias: (V, d), (V,).
        reward_weight: (K, V, d), "full" only. reward_down, reward_up: down and up of
            :func:`correction`.
        reward_bias: (K, n), or None for "full".
    Returns: (K, ...) in fp32 or float64.
    """
    dtype = accumulator_dtype(hidden.dtype)
    rows, rewards = lm_weight[labels].to(dtype), []
    count = (reward_weight if reward_head == "full" else reward_bias).shape[0]
    for k in range(count):
        if reward_head == "full":
            value = ((reward_weight[k][labels].to(dtype) - rows) * hidden.to(dtype)).sum(-1)
            if reward_bias is not None:
                value = value + (reward_bias[k] - lm_bias).to(dtype)[labels]
        elif reward_head == "embedding":
            maps = (
                (None, None) if reward_down is None else (reward_down[k, None], reward_up[k, None])
            )
            value = (rows * correction(hidden, *maps, reward_bias[k, None])).sum(-1)
        else:
            inner = F.linear(hidden, reward_down[k]).to(dtype)
            value = (reward_up[k][labels].to(dtype) * inner).sum(-1)
            value = value + reward_bias[k].to(dtype)[labels]
        rewards.append(value)
    return torch.stack(rewards)


def mixing_weight(
    gate_logit: Tensor, controls: Controls, mix: str = "logits"
) -> tuple[Tensor, Tensor]:
    """(gate logit, alpha) under the controls, applied in this order:

    1. ``gate_offset`` is added to the logit.
    2. alpha is ``sigmoid(gate_logit)``, or the control ``alpha`` if given.
    3. alpha is multiplied by ``strength`` and clamped to at least 0, in the probability mix also to
       at most 1. Strength 0 gives 0, even if alpha is NaN.
    4. alpha < ``skip_threshold`` becomes 0, and |1 - alpha| < ``skip_threshold`` becomes 1.

    gate_logit: (B, ...) fp32 or float64. controls: rows (B,).
    """
    shape = (-1, *(1,) * (gate_logit.dim() - 1))
    rows = {
        name: row.to(gate_logit.dtype).view(shape)
        for name, row in controls.operands().items()
        if name != "objective_weights"
    }
    if "gate_offset" in rows:
        gate_logit = gate_logit + rows["gate_offset"]
    if "alpha" in rows:
        weight = rows["alpha"].expand_as(gate_logit)
    else:
        weight = torch.sigmoid(gate_logit)
    if (strength := rows.get("strength")) is not None:
        highest = 1.0 if mix == "probs" else None
        scaled = (strength * weight).clamp(0.0, highest)
        weight = torch.where(strength == 0, torch.zeros_like(weight), scaled)
    if (threshold := rows.get("skip_threshold")) is not None:
        near_one = (1 - weight).abs() < threshold
        weight = torch.where(weight < threshold, torch.zeros_like(weight), weight)
        weight = torch.where(near_one, torch.ones_like(weight), weight)
    return gate_logit, weight


def mix_logits(
    z_lm: Tensor,
    z_rm: Tensor,
    alpha: Tensor,
    mix: str = "logits",
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
) -> Tensor:
    """The mixture of both heads: z_lm, z_rm (..., V) and alpha (...) -> (..., V).

    ``mix="logits"``: ``f((1-a) z_LM + a z_RM)`` (paper, Methodology). ``mix="probs"``: the log of
    ``(1-a) softmax(f(z_LM)) + a softmax(f(z_RM))`` (paper, Analysis). a = 0 and a = 1 select one
    head, so infinite or NaN values of the other head have no effect.
    """
    a = alpha.unsqueeze(-1)
    if mix == "logits":
        mixed = (1 - a) * z_lm + a * z_rm
        return postprocess(
            torch.where(a == 0, z_lm, torch.where(a == 1, z_rm, mixed)), logit_scale, logit_softcap
        )
    lp_lm = torch.log_softmax(postprocess(z_lm, logit_scale, logit_softcap), dim=-1)
    lp_rm = torch.log_softmax(postprocess(z_rm, logit_scale, logit_softcap), dim=-1)
    # log 0 is kept out of the graph: its gradient, inf * 0, would be NaN.
    inside = torch.where((a > 0) & (a < 1), a, torch.full_like(a, 0.5))
    mixed = torch.logaddexp(torch.log1p(-inside) + lp_lm, torch.log(inside) + lp_rm)
    mixed = torch.where(torch.isnan(a), a, mixed)
    return torch.where(a == 0, lp_lm, torch.where(a == 1, lp_rm, mixed))
