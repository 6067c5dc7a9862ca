# SPDX-License-Identifier: Apache-2.0
"""One decode step of a reward head that is a correction, by calls of the compiled step.

A step whose every alpha is 0 is the plain LM head with the sampler, and reads one matrix. So the
gate, the small products and the product with the vocabulary are each such a step, which keeps the
promises of the compiled one: any format of the LM head, and a row that is what it is alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import DecodeOutput
from ..ops.logits import accumulator_dtype
from .controls import Controls
from .mixture import mix_logits, mixing_weight, move_hidden
from .token_choice import STATUS_CACHE_FULL, STATUS_NON_FINITE, choose_token

_DRAW = ("seeds", "draws", "temperature", "top_k", "top_p", "min_p")


def _plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, **arguments: Any
) -> DecodeOutput:
    """The step of the plain head ``weight h + bias``: alpha is 0, the reward head is not read."""
    nothing = hidden.new_zeros(hidden.shape[0], dtype=accumulator_dtype(hidden.dtype))
    if "cache_k" not in arguments:
        arguments["gate_logit"] = nothing
    return ops.decode_step(
        hidden=hidden,
        lm_weight=weight,
        lm_bias=bias,
        lm_scale=scale,
        reward_weight=weight[None],
        reward_bias=None if bias is None else bias[None],
        reward_scale=None if scale is None else scale[None],
        strength=nothing,
        **arguments,
    )


def _change(
    inner: Tensor | None, up: Tensor | None, bias: Tensor, shares: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``sum_k w_k (U_k x_k + c_k)`` with inner (B, K r) = D h, as :func:`.mixture.correction`."""
    count = bias.shape[0]
    if shares is None and count > 1:
        shares = bias.new_full((1, count), 1 / count, dtype=accumulator_dtype(dtype))
    total = bias.to(accumulator_dtype(dtype))
    total = total if shares is None else (shares[..., None] * total).sum(1)
    for k in range(count if up is not None else 0):
        part = inner.unflatten(-1, (count, -1))[:, k]
        if shares is not None:
            part = part * shares[:, k, None]
        total = total + _plain(part.to(dtype), up[k], None, None).logits
    return total


def decode_step(
    *,
    hidden: Tensor,
    lm_weight: Tensor,
    lm_bias: Tensor | None = None,
    lm_scale: Tensor | None = None,
    reward_head: str,
    reward_down: Tensor | None,
    reward_up: Tensor | None,
    reward_bias: Tensor,
    gate_logit: Tensor | None = None,
    mix_probs: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    return_logits: bool = True,
    record_attention: bool = False,
    **arguments: Tensor | None,
) -> DecodeOutput:
    """:func:`dualhead_ext.reference.decode_step` for ``reward_head`` "embedding" or "lowrank", on
    devices and dtypes that :func:`ops.kernel_for` names. The logits mix of "embedding" is one
    product with the LM head, on ``h + a (M h + c)``; the rest mixes logits in eager PyTorch.

    arguments: controls, what chooses the token, and those of the attention gate.
    """
    mix, rows = "probs" if mix_probs else "logits", hidden.shape[0]
    controls = Controls.take(arguments)
    draw = {name: arguments.pop(name, None) for name in _DRAW}
    down = None if reward_down is None else reward_down.flatten(0, 1)
    recorded = hidden.new_empty(0, dtype=accumulator_dtype(hidden.dtype))
    inner = full = None
    if gate_logit is None:
        matrix = arguments["k_weight"][:1] if down is None else down
        first = _plain(hidden, matrix, None, None, record_attention=record_attention, **arguments)
        gate_logit, recorded, inner = first.gate_logit, first.attention, first.logits
        full = first.status == STATUS_CACHE_FULL
    elif down is not None:
        inner = _plain(hidden, down, None, None).logits
    gate_logit, weight = mixing_weight(gate_logit, controls, mix)
    if full is not None:
        weight = weight.masked_fill(full, torch.nan)
    change = _change(inner, reward_up, reward_bias, controls.objective_weights, hidden.dtype)

    lm = (lm_weight, lm_bias, lm_scale)
    post = {"logit_scale": logit_scale, "logit_softcap": logit_softcap}
    if reward_head == "embedding" and mix == "logits":
        moved = move_hidden(hidden, change, weight)
        out = _plain(moved, *lm, **post, **draw, return_logits=return_logits)
        status = out.status
        if full is not None:
            status = status.masked_fill(full, STATUS_CACHE_FULL)
            if draw["seeds"] is not None:
                draw["draws"] -= full.to(torch.int64)  # a row that is full has not drawn
        return DecodeOutput(
            out.logits, weight, gate_logit, out.token, out.logprob, status, recorded
        )
    if reward_head == "embedding":
        moved = move_hidden(hidden, change, torch.ones_like(weight))
        z_lm, z_rm = _plain(torch.cat((hidden, moved)), *lm).logits.split(rows)
    else:
        z_lm = _plain(hidden, *lm).logits
        z_rm = z_lm + change
    full = torch.zeros_like(weight, dtype=torch.bool) if full is None else full

    def chosen(part: slice) -> DecodeOutput:
        logits = mix_logits(z_lm[part], z_rm[part], weight[part], mix, **post)
        own = {name: None if value is None else value[part] for name, value in draw.items()}
        here = (weight[part], gate_logit[part], full[part], recorded[part])
        return _chosen(logits, *here, own, return_logits)

    if hidden.device.type != "cpu":
        return chosen(slice(None))
    # Row by row: how the CPU computes exp and log depends on where in the tensor a number lies.
    parts = [chosen(slice(b, b + 1)) for b in range(rows)]
    return DecodeOutput(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _chosen(
    logits: Tensor,
    weight: Tensor,
    gate_logit: Tensor,
    full: Tensor,
    attention: Tensor,
    draw: dict[str, Tensor | None],
    return_logits: bool,
) -> DecodeOutput:
    """The end of a step: a token of mixed logits (B, V) at alpha ``weight`` (B,), and its status.
    full (B,) bool: rows whose cache is full. draw: seeds, draws and filters.
    """
    weight, gate_logit = (x.masked_fill(full, torch.nan) for x in (weight, gate_logit))
    logits = logits.masked_fill(full[:, None], torch.nan)
    token, logprob, failed = choose_token(logits, draw, weight.isnan())
    if draw["seeds"] is not None:
        draw["draws"] += (~full).to(torch.int64)
    status = failed.int() * STATUS_NON_FINITE
    status = status.masked_fill(full, STATUS_CACHE_FULL)
    logits = logits if return_logits else logits.new_empty(0)
    return DecodeOutput(logits, weight, gate_logit, token, logprob, status, attention)
