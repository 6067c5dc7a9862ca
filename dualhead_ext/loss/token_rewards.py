# SPDX-License-Identifier: Apache-2.0
"""Token rewards, ``delta_k(y) = z_k[y] - z_LM[y]``, from the rows of the weights at the labels, one
block of tokens at a time.

``delta_k(y) = (W_RM,k[y] - W_LM[y]) . h``, ``W_LM[y] . (U_k D_k h + c_k)`` or
``B_k[y] . (A_k h) + b_k[y]``. Rows are gathered and hidden states cast for one block at a time, and
again in the backward pass. So only the rewards take memory for all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.logits import accumulator_dtype
from .heads import Heads

# Bytes of a block's hidden states in fp32. More on a GPU, where a block is dozens of launches.
BLOCK_BYTES = {"cpu": 1 << 19}
_BLOCK_BYTES_ELSEWHERE = 32 << 20

# For each kind of head: the weights with a row per label (and its dimension), and the others.
_ROWS = {
    "full": {"lm_weight": 0, "lm_bias": 0, "reward_weight": 1, "reward_bias": 1},
    "embedding": {"lm_weight": 0},
    "lowrank": {"reward_up": 1, "reward_bias": 1},
}
_WHOLE: dict[str, tuple[str, ...]] = {
    "full": (),
    "embedding": ("reward_down", "reward_up", "reward_bias"),
    "lowrank": ("reward_down",),
}


def token_rewards(
    hidden: Tensor, places: tuple[Tensor, Tensor], labels: Tensor, heads: Heads
) -> Tensor:
    """The rewards (K, N) in fp32 or float64: hidden (R, T, d), the tokens' (rows, columns) in it,
    (N,) each, labels (N,). No product with the vocabulary; has a first derivative only.
    """
    names = [*_ROWS[heads.reward_head], *_WHOLE[heads.reward_head]]
    if heads.reward_bias is None:
        names = [name for name in names if not name.endswith("bias")]
    inputs = {name: getattr(heads, name) for name in names if getattr(heads, name) is not None}
    return _Rewards.apply(heads.reward_head, places, labels, [*inputs], hidden, *inputs.values())


def refuse_second_derivative() -> None:
    """Raise RuntimeError if the backward pass of the loss would itself be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "dual_head_loss: has a first derivative only; create_graph=True is not supported"
        )


class _Rewards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        places: tuple[Tensor, Tensor],
        labels: Tensor,
        names: list[str],
        hidden: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.kind, ctx.names = kind, names
        ctx.save_for_backward(*places, labels, hidden, *inputs)
        named = dict(zip(names, inputs, strict=True))
        objectives = len(named["reward_weight" if kind == "full" else "reward_bias"])
        out = hidden.new_empty(objectives, len(labels), dtype=accumulator_dtype(hidden.dtype))
        for block in _blocks(labels, hidden):
            rows, columns = (place[block] for place in places)
            picked = _picked(kind, named, labels[block])
            out[:, block] = _rewards(kind, hidden[rows, columns], picked)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        refuse_second_derivative()
        rows, columns, labels, hidden, *inputs = ctx.saved_tensors
        named = {"hidden": hidden} | dict(zip(ctx.names, inputs, strict=True))
        wanted = [n for n, w in zip(named, ctx.needs_input_grad[4:], strict=True) if w]
        dtype = upstream.dtype
        totals = {name: torch.zeros_like(named[name], dtype=dtype) for name in wanted}
        along = _ROWS[ctx.kind]
        for block in _blocks(labels, hidden):
            places, of_block = (rows[block], columns[block]), labels[block]
            held = _picked(ctx.kind, {n: named[n] for n in ctx.names}, of_block)
            held["hidden"] = hidden[places]
            held = {n: x.detach().requires_grad_(n in wanted) for n, x in held.items()}
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                found = _rewards(ctx.kind, held["hidden"], held)
                # With rank 0, the result does not depend on the hidden states.
                leaves = [held[name] for name in wanted]
                grads = torch.autograd.grad(found, leaves, upstream[:, block], allow_unused=True)
            for name, grad in zip(wanted, grads, strict=True):
                if grad is None:
                    continue
                total, grad = totals[name], grad.to(dtype)
                if name == "hidden":
                    total[places] = grad
                elif name in along:
                    # A token may occur more than once. On CUDA this sums in a fixed order;
                    # index_add_ does not.
                    first = torch.arange(len(total), device=total.device)[:, None]
                    index = (of_block,) if along[name] == 0 else (first, of_block[None])
                    total.index_put_(index, grad, accumulate=True)
                else:
                    total += grad
        given = {name: total.to(named[name].dtype) for name, total in totals.items()}
        return None, None, None, None, *(given.get(name) for name in named)


def _blocks(labels: Tensor, hidden: Tensor) -> list[slice]:
    of_block = BLOCK_BYTES.get(hidden.device.type, _BLOCK_BYTES_ELSEWHERE)
    size = max(1, of_block // (4 * hidden.shape[-1]))
    return [slice(start, start + size) for start in range(0, len(labels), size)]


def _picked(kind: str, named: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The rows of the labels from weights that have one row per token; other weights whole."""
    along = _ROWS[kind]
    return {n: x.index_select(along[n], labels) if n in along else x for n, x in named.items()}


def _rewards(kind: str, hidden: Tensor, picked: dict[str, Tensor]) -> Tensor:
    """Rewards (K, n) of hidden (n, d) and the result of :func:`_picked`."""
    dtype = accumulator_dtype(hidden.dtype)
    x = {name: value.to(dtype) for name, value in picked.items() if name != "hidden"}
    hidden = hidden.to(dtype)
    if kind == "full":
        found = ((x["reward_weight"] - x["lm_weight"]) * hidden).sum(-1)
        return found if "reward_bias" not in x else found + (x["reward_bias"] - x["lm_bias"])
    inner = hidden @ x["reward_down"].mT if "reward_down" in x else None
    if kind == "lowrank":
        return (x["reward_up"] * inner).sum(-1) + x["reward_bias"]
    change = x["reward_bias"][:, None]
    if inner is not None:
        change = inner @ x["reward_up"].mT + change
    return (change * x["lm_weight"]).sum(-1)
