# SPDX-License-Identifier: Apache-2.0
"""The dual head in plain PyTorch. It defines what the kernels compute, runs if no kernel applies,
and is the baseline of the benchmarks.

Written to be read beside the paper, in its order: the gate, the two heads, their mixture, the
choice of a token, one decode step. It takes any floating-point dtype. Products run in the dtype of
the weights, everything after them in fp32 (float64 for float64). Dimensions: B batch, T tokens, d
hidden, V vocabulary, K objectives, H gate heads, d_k their size, g = H d_k, S cache columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import accumulator_dtype as accumulator_dtype
from .heads import corrected_logits as corrected_logits
from .heads import correction as correction
from .heads import head_logits as head_logits
from .heads import move_hidden as move_hidden
from .heads import reward_logits as reward_logits
from .heads import token_rewards as token_rewards
from .sampling import keep_mask as keep_mask
from .sampling import philox_uniform as philox_uniform
from .sampling import sample_token as sample_token

STATUS_OK, STATUS_NON_FINITE, STATUS_CACHE_FULL = 0, 1, 2


def attention_gate_logit(
    hidden: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_heads: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The attention gate, as printed in the paper (Methodology), but causal.

    ``a_t = W_O Concat_i softmax_{s<=t}(q_{t,i}.k_{s,i} / sqrt(d_k)) v_{s,i}``; ``logit_t = w_g.a_t
    + b_g``.

    Args:
        hidden: (B, T, d). q_weight, k_weight, v_weight: (g, d). o_weight: (g, g). out_weight: (1,
            g). out_bias: (1,).
        attention_mask: (B, T), nonzero = real token. A position with no real token up to and
            including itself gets ``b_g``.
    Returns: (B, T), fp32 or float64; alpha is its sigmoid.
    """
    batch, length, _ = hidden.shape
    q, k, v = (
        F.linear(hidden, w).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for w in (q_weight, k_weight, v_weight)
    )
    accumulate = accumulator_dtype(hidden.dtype)
    scores = (q.to(accumulate) @ k.to(accumulate).transpose(-1, -2)) / math.sqrt(
        q.shape[-1]
    )  # (B, H, T, T)
    visible = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    weights = masked_softmax(scores, visible)
    context = (weights @ v.to(accumulate)).transpose(1, 2).reshape(batch, length, -1)  # (B, T, g)
    context = F.linear(context, o_weight.to(accumulate))
    return F.linear(context, out_weight.to(accumulate), out_bias.to(accumulate)).squeeze(-1)


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension where ``visible``. A row without visible entries is all zero,
    never NaN.
    """
    weights = scores.masked_fill(~visible, -torch.inf)
    seen = visible.any(-1, keepdim=True)
    # Such rows get finite scores first: the softmax of a row of -inf is NaN, also in backward.
    return torch.softmax(weights.masked_fill(~seen, 0.0), dim=-1).masked_fill(~visible, 0.0)


def fold_values(v_weight: Tensor, o_weight: Tensor, out_weight: Tensor, num_heads: int) -> Tensor:
    """The folded value rows U: ``U_i = W_V,i^T c_i`` with c = W_O^T w_g. Of a past position's value
    the gate needs only ``u_{s,i} = U_i.h_s``: ``logit_t = sum_i sum_s p_{t,i,s} u_{s,i} + b_g``
    (exact in real arithmetic). v_weight (g, d), o_weight (g, g), out_weight (1, g) -> (H, d), fp32
    or float64.
    """
    accumulate = accumulator_dtype(v_weight.dtype)
    c = out_weight.to(accumulate) @ o_weight.to(accumulate)  # (1, g)
    return torch.einsum(
        "hk,hkd->hd", c.view(num_heads, -1), v_weight.to(accumulate).unflatten(0, (num_heads, -1))
    )


def mixing_weight(
    gate_logit: Tensor,
    alpha: Tensor | None = None,
    strength: Tensor | None = None,
    skip_threshold: Tensor | None = None,
    mix: str = "logits",
) -> Tensor:
    """alpha from the gate's logit and the controls, applied in this order:

    1. alpha is ``sigmoid(gate_logit)``, or the control ``alpha`` if given.
    2. alpha is multiplied by ``strength`` and clamped to at least 0, in the probability mix also to
       at most 1. Strength 0 gives 0, even if alpha is NaN.
    3. alpha < ``skip_threshold`` becomes 0, and |1 - alpha| < ``skip_threshold`` becomes 1, so that
       the unused head need not be read.

    All shapes broadcast.
    """
    dtype = gate_logit.dtype
    a = torch.sigmoid(gate_logit) if alpha is None else alpha.to(dtype).expand_as(gate_logit)
    if strength is not None:
        s = strength.to(dtype)
        a = torch.where(s == 0, 0.0, torch.clamp(s * a, min=0.0))
        a = torch.clamp(a, max=1.0) if mix == "probs" else a
    if skip_threshold is not None:
        threshold = skip_threshold.to(dtype)
        near_0, near_1 = a < threshold, torch.abs(1 - a) < threshold
        a = torch.where(near_0, 0.0, torch.where(near_1, 1.0, a))
    return a


def postprocess(logits: Tensor, logit_scale: float = 1.0, logit_softcap: float = 0.0) -> Tensor:
    """The backbone's f(z) = ``cap(logit_scale * z)``, ``cap(z) = c tanh(z / c)``; c = 0: no cap."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcap > 0.0:
        logits = torch.tanh(logits / logit_softcap) * logit_softcap
    return logits


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


class DecodeOutput(NamedTuple):
    """The result of one step; :func:`dualhead_ext.ops.decode_step` has the shapes."""

    logits: Tensor
    alpha: Tensor
    gate_logit: Tensor
    token: Tensor
    logprob: Tensor
    status: Tensor
    attention: Tensor


def append_and_attend(
    hidden: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    u_weight: Tensor,
    cache_k: Tensor,
    cache_u: Tensor,
    cache_valid: Tensor,
    cache_length: Tensor,
    new_valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the new position's key and folded value, then attend over the cache. Rows whose cache
    is full are not changed.

    Returns (gate logit without b_g (B,), attention rows (B, H, S), full (B,) bool). Lengths are
    read on the device, without a synchronisation.
    """
    batch, heads, capacity, head_dim = cache_k.shape
    accumulate = accumulator_dtype(hidden.dtype)
    full = cache_length >= capacity
    rows, column = (
        torch.arange(batch, device=hidden.device),
        cache_length.clamp(max=capacity - 1).long(),
    )
    fresh_k = F.linear(hidden, k_weight).unflatten(-1, (heads, head_dim))
    fresh_u = F.linear(hidden.to(accumulate), u_weight.to(accumulate))
    fresh_valid = torch.ones_like(full) if new_valid is None else new_valid
    cache_k[rows, :, column] = torch.where(full[:, None, None], cache_k[rows, :, column], fresh_k)
    cache_u[rows, :, column] = torch.where(
        full[:, None], cache_u[rows, :, column], fresh_u.to(cache_u.dtype)
    )
    cache_valid[rows, column] = torch.where(full, cache_valid[rows, column], fresh_valid)
    cache_length += (~full).to(cache_length.dtype)

    q = F.linear(hidden, q_weight).unflatten(-1, (heads, head_dim)).to(accumulate)
    scores = torch.einsum("bhk,bhsk->bhs", q, cache_k.to(accumulate)) / math.sqrt(head_dim)
    filled = torch.arange(capacity, device=hidden.device) < cache_length[:, None]
    visible = (filled & cache_valid & ~full[:, None])[:, None, :].expand_as(scores)
    weights = masked_softmax(scores, visible)
    # Unfilled columns may hold NaN, and 0 * NaN must not reach the sum.
    values = cache_u.to(accumulate).masked_fill(~visible, 0.0)
    return (weights * values).sum((1, 2)), weights, full


def decode_step(
    *,
    hidden: Tensor,
    lm_weight: Tensor,
    lm_bias: Tensor | None = None,
    reward_weight: Tensor | None = None,
    reward_bias: Tensor | None = None,
    objective_weights: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    u_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    cache_k: Tensor | None = None,
    cache_u: Tensor | None = None,
    cache_valid: Tensor | None = None,
    cache_length: Tensor | None = None,
    new_valid: Tensor | None = None,
    gate_logit: Tensor | None = None,
    gate_offset: Tensor | None = None,
    strength: Tensor | None = None,
    alpha: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    draws: Tensor | None = None,
    lm_scale: Tensor | None = None,
    reward_scale: Tensor | None = None,
    skip_threshold: Tensor | None = None,
    mix_probs: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    return_logits: bool = True,
    record_attention: bool = False,
    limit_alpha: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    reward_head: str = "full",
    reward_down: Tensor | None = None,
    reward_up: Tensor | None = None,
) -> DecodeOutput:
    """One decode step, from hidden states to tokens: the definition of the operator
    ``dualhead::decode_step``.

    :func:`dualhead_ext.ops.decode_step` documents the arguments and results. One argument is added:
    ``limit_alpha`` maps (z_LM, z_RM, alpha) to the alpha to mix with
    (:mod:`dualhead_ext.head.kl_cap`).
    """
    batch = hidden.shape[0]
    accumulate = accumulator_dtype(hidden.dtype)
    full = torch.zeros(batch, dtype=torch.bool, device=hidden.device)
    attention = hidden.new_empty(0, dtype=accumulate)
    if gate_logit is None:
        context, rows, full = append_and_attend(
            hidden,
            q_weight,
            k_weight,
            u_weight,
            cache_k,
            cache_u,
            cache_valid,
            cache_length,
            new_valid,
        )
        gate_logit = context + gate_bias.to(accumulate)
        attention = rows if record_attention else attention
    gate_logit = gate_logit.to(accumulate)
    if gate_offset is not None:
        gate_logit = gate_logit + gate_offset.to(accumulate)
    mix = "probs" if mix_probs else "logits"
    weight = mixing_weight(gate_logit, alpha, strength, skip_threshold, mix)

    z_lm = head_logits(hidden, lm_weight, lm_bias, lm_scale)
    if reward_head == "full":
        z_rm = reward_logits(hidden, reward_weight, reward_bias, objective_weights, reward_scale)
    else:
        maps = (reward_down, reward_up, reward_bias)
        z_rm = corrected_logits(
            hidden, z_lm, reward_head, *maps, objective_weights, lm_weight, lm_scale
        )
    if limit_alpha is not None:
        weight = limit_alpha(z_lm, z_rm, weight)
    logits = mix_logits(z_lm, z_rm, weight, mix, logit_scale, logit_softcap)

    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    draw = {"seeds": seeds, "draws": draws, **filters}
    return chosen(logits, weight, gate_logit, full, attention, draw, return_logits)


def chosen(
    logits: Tensor,
    weight: Tensor,
    gate_logit: Tensor,
    full: Tensor,
    attention: Tensor,
    draw: dict[str, Tensor | None],
    return_logits: bool = True,
) -> DecodeOutput:
    """The end of a step: choose tokens from mixed logits (B, V), and set the status. weight (B,):
    alpha. full (B,) bool: rows whose cache is full. draw: seeds, draws and filters.
    """
    seeds, draws = draw["seeds"], draw["draws"]
    nan = torch.full_like(weight, torch.nan)
    weight, gate_logit = torch.where(full, nan, weight), torch.where(full, nan, gate_logit)
    logits = torch.where(full[:, None], nan[:, None], logits)
    lse = torch.logsumexp(logits, dim=-1)
    failed = torch.isnan(weight) | ~torch.isfinite(lse)
    usable = torch.where(failed[:, None], torch.zeros_like(logits), logits)
    if seeds is None:
        token = torch.argmax(usable, dim=-1)
    else:
        token = sample_token(usable, **draw)
        draws += (~full).to(draws.dtype)
    token = torch.where(failed, torch.zeros_like(token), token)
    logprob = torch.where(failed, nan, logits.gather(-1, token[:, None]).squeeze(-1) - lse)
    status = failed.int() * STATUS_NON_FINITE
    status = torch.where(full, torch.full_like(status, STATUS_CACHE_FULL), status)
    logits = logits if return_logits else logits.new_empty(0)
    return DecodeOutput(logits, weight, gate_logit, token, logprob, status, attention)
