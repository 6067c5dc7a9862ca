# SPDX-License-Identifier: Apache-2.0
"""Conversions of reward heads: to full matrices, to corrections, and to weighted sums.

They work on ``delta_k = Delta_k h + beta_k = z_RM,k - z_LM``, Delta_k (V, d), beta_k (V,).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def delta_of(head: Any, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(Delta_k, beta_k) of a head in full precision."""
    reward, weight = head.reward_head, head.lm_weight.to(dtype)
    if reward.kind == "full":
        bias = weight.new_zeros(len(weight))
        if reward.bias is not None:
            bias = reward.bias[k].to(dtype) - head.lm_bias.to(dtype)
        return reward.weight[k].to(dtype) - weight, bias
    down, up = (None if w is None else w[k].to(dtype) for w in reward.maps)
    bias = reward.bias[k].to(dtype)
    if reward.kind == "lowrank":
        return up @ down, bias
    delta = torch.zeros_like(weight) if down is None else (weight @ up) @ down
    return delta, weight @ bias


def reward_linear(head: Any, shares: Tensor) -> tuple[Tensor, Tensor | None]:
    """(W, b) of ``z_RM = W h + b`` at objective weights ``shares`` (K,): the weighted sum of the K
    matrices of a full head, or the LM head plus the weighted corrections.
    """
    dtype = shares.dtype
    if head.reward_head.kind == "full":
        bias = head.reward_head.bias
        weight = torch.einsum("k,kvd->vd", shares, head.reward_head.weight.to(dtype))
        return weight, None if bias is None else shares @ bias.to(dtype)
    weight, bias = head.lm_weight.to(dtype), head.lm_bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
    for k, share in enumerate(shares):
        delta, beta = delta_of(head, k, dtype)
        weight, bias = weight + share * delta, bias + share * beta
    return weight, bias


def concatenate(reward: Any, shares: Tensor) -> dict[str, Tensor]:
    """The state dict of one correction of rank K r for ``sum_k w_k delta_k``; shares w (K,)."""
    state = {"bias": (shares @ reward.bias.to(shares.dtype))[None]}
    down, up = reward.maps
    if down is not None:
        weighted = shares[:, None, None] * up.to(shares.dtype)
        state["down.weight"] = down.flatten(0, 1)[None]
        state["up.weight"] = weighted.transpose(0, 1).flatten(1)[None]
    return state


class Compressed(NamedTuple):
    """The result of :meth:`DualHead.compress`: the head, and for each objective (K,) the share of
    delta that is lost, ``sqrt(E |delta - delta'|^2 / E |delta|^2)``, norms over the vocabulary.
    """

    head: Any
    error: Tensor


def _moments(hidden: Tensor | None, size: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, square root S of the covariance, pseudo-inverse of S) of hidden states. Without hidden
    states: 0, I, I.
    """
    one = torch.eye(size, dtype=torch.float64, device=device)
    if hidden is None:
        return one.new_zeros(size), one, one
    rows = hidden.detach().to(one).reshape(-1, size)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    kept = values > values.max().clamp(min=0) * 1e-12
    root = values.clamp(min=0).sqrt() * kept
    inverse = torch.where(kept, 1 / root.clamp(min=1e-300), 0.0)
    return mean, (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def compress_delta(
    delta: Tensor, beta: Tensor, rank: int, lm_weight: Tensor | None, hidden: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The best correction of a rank for one objective, and its error as in :class:`Compressed`.

    With ``lm_weight``: "embedding", W_LM M with M = R^+ [Q^T Delta S]_r S^+, W_LM = Q R. Without:
    "lowrank", [Delta S]_r S^+. [.]_r is the truncated singular value decomposition, S the root of
    the hidden states' covariance. The bias absorbs the error at their mean.
    """
    mean, root, inverse = _moments(hidden, delta.shape[1], delta.device)
    moved, center = delta @ root, beta + delta @ mean
    basis, triangle = torch.linalg.qr(moved if lm_weight is None else lm_weight)
    seen = basis.T @ moved
    u, s, vh = torch.linalg.svd(seen, full_matrices=False)
    u, s, down = u[:, :rank] * s[:rank], s[:rank], vh[:rank] @ inverse
    total = moved.square().sum() + center.square().sum()
    lost = moved.square().sum() - s.square().sum()
    if lm_weight is None:
        up, bias = basis @ u, center
    else:
        back = torch.linalg.pinv(triangle)
        up, bias = back @ u, back @ (basis.T @ center)
        lost = lost + (center - lm_weight @ bias).square().sum()
    bias = bias - up @ (down @ mean)
    error = (lost.clamp(min=0) / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt()
    return {"down.weight": down, "up.weight": up, "bias": bias}, error


def compressed_state(
    head: Any, kind: str, rank: int, hidden: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """(state dict of the reward head, errors (K,)); see :meth:`DualHead.compress`."""
    states, errors = [], []
    weight = head.lm_weight.double() if kind == "embedding" else None
    for k in range(head.config.num_objectives):
        delta, beta = delta_of(head, k, torch.float64)
        state, error = compress_delta(delta, beta, rank, weight, hidden)
        states.append(state)
        errors.append(error)
    names = ("bias",) if rank == 0 else ("down.weight", "up.weight", "bias")
    stacked = {name: torch.stack([state[name] for state in states]) for name in names}
    return stacked, torch.stack(errors)
