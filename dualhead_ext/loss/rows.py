# SPDX-License-Identifier: Apache-2.0
"""The part of the fused loss between its products: a chunk's logits to log-probabilities, and back
to the gradients of the logits, in place.

With s = sigmoid(l), z = (1 - s) z_LM + s z_RM, p = softmax(f(z)) and an upstream gradient c of
log p_y (whose derivative with respect to f is onehot - p):

    logits   dz = c (onehot - p) f'(z)     dz_LM = (1 - s) dz     dz_RM = s dz
             dl = s (1 - s) sum_v dz_v (z_RM,v - z_LM,v)
    probs    log P_y = log((1 - s) p_LM,y + s p_RM,y),   q = s p_RM,y / P_y   (the posterior)
             dz_LM = c (1 - q) (onehot - p_LM) f'(z_LM)     dz_RM = c q (onehot - p_RM) f'(z_RM)
             dl = c (q - s) = c s (p_RM,y / P_y - 1) = c (1 - s) (1 - p_LM,y / P_y)

The reward head's own log-probability adds ``c_r (onehot - p_RM) f'(z_RM)`` to dz_RM. A share of
exactly 0 selects the other head, and dl is 0. `f' = scale (1 - (f / cap)^2)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.logits import postprocess
from .terms import LossOptions

# Rows whose KL is computed together, since it makes several copies of them.
KL_ROWS = 64


@dataclass
class Rows:
    """The result of :func:`log_probabilities`, for :func:`gradients_`.

    Attributes:
        z_lm, z_rm: (n, V), later overwritten by their gradients; z_lm is None if nothing is mixed.
        gate_logit, labels: (n,).
        mixed, reward: (n,) log-probabilities of the labels; None if not requested.
        normalizers: (2, n), the kernel's log-sum-exps; None without a kernel (other devices,
            float64).
    """

    z_lm: Tensor | None
    z_rm: Tensor
    gate_logit: Tensor
    labels: Tensor
    options: LossOptions
    mixed: Tensor | None
    reward: Tensor | None
    normalizers: Tensor | None


def log_probabilities(
    z_lm: Tensor | None,
    z_rm: Tensor,
    gate_logit: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    mixed: bool,
    reward: bool,
    impl: str | None = None,
) -> Rows:
    """``log P_y`` of the mixture if ``mixed``, and ``log softmax(f(z_RM))_y`` if ``reward``.

    Args:
        z_lm, z_rm: (n, V) fp32 or float64; kept for :func:`gradients_`.
        gate_logit: (n,) in the same dtype. labels: (n,) int64.
        options: mix, logit_scale and logit_softcap are used.
        impl: for tests, "kernel" or "torch". Default: the kernel if there is one.
    """
    rows = Rows(z_lm, z_rm, gate_logit, labels, options, None, None, None)
    if not (mixed or reward):
        return rows
    if impl == "kernel" or (impl is None and ops.loss_rows_kernel_for(z_rm)):
        found = ops.loss_rows(
            z_lm, z_rm, gate_logit, labels, mixed, reward, *_kernel_options(options)
        )
        rows.mixed, rows.reward = found[0] if mixed else None, found[1] if reward else None
        rows.normalizers = found[2]
        return rows
    if reward or (mixed and options.mix == "probs"):
        of_reward = _log_prob(_post(z_rm, options), labels)
        rows.reward = of_reward if reward else None
    if mixed and options.mix == "logits":
        rows.mixed = _log_prob(_post(_mixture(rows), options), labels)
    elif mixed:
        _, lm_only, rm_only = _shares(gate_logit)
        lm = _log_prob(_post(z_lm, options), labels)
        both = torch.logaddexp(F.logsigmoid(-gate_logit) + lm, F.logsigmoid(gate_logit) + of_reward)
        rows.mixed = torch.where(lm_only, lm, torch.where(rm_only, of_reward, both))
        rows.mixed = rows.mixed.clamp(max=0.0)  # rounding may give a probability above 1
    return rows


def kl(rows: Rows) -> Tensor:
    """``KL(pi_mix || pi_LM)`` of each row in nats, (n,)."""
    values = (rows.z_lm, rows.z_rm, rows.gate_logit)
    parts = zip(*(x.split(KL_ROWS) for x in values), strict=True)
    return torch.cat([_kl(z_lm, z_rm, logit, rows.options) for z_lm, z_rm, logit in parts])


def _kl(z_lm: Tensor, z_rm: Tensor, gate_logit: Tensor, options: LossOptions) -> Tensor:
    """:func:`kl` of given tensors, differentiable; 0 where alpha is exactly 0."""
    _, lm_only, rm_only = (x[:, None] for x in _shares(gate_logit))
    lm = torch.log_softmax(_post(z_lm, options), -1)
    if options.mix == "logits":
        share, rest = torch.sigmoid(gate_logit)[:, None], torch.sigmoid(-gate_logit)[:, None]
        mixed = torch.where(rm_only, z_rm, rest * z_lm + share * z_rm)
        mixed = torch.log_softmax(_post(mixed, options), -1)
    else:
        rm = torch.log_softmax(_post(z_rm, options), -1)
        # An infinite logit is handled by the selection below, and kept out of the graph.
        logit = gate_logit.masked_fill(torch.isinf(gate_logit), 0.0)[:, None]
        mixed = torch.logaddexp(F.logsigmoid(-logit) + lm, F.logsigmoid(logit) + rm)
        mixed = torch.where(rm_only, rm, mixed)
    mixed = torch.where(lm_only, lm, mixed)
    # A token of probability 0 adds nothing; log 0 - log 0 would be NaN.
    ratio = (mixed - lm).masked_fill(mixed == -torch.inf, 0.0)
    return (mixed.exp() * ratio).sum(-1)


def gradients_(
    rows: Rows,
    mixed_grad: Tensor,
    reward_grad: Tensor | None,
    kl_grad: Tensor | None = None,
    *,
    lm: bool,
) -> Tensor | None:
    """Overwrite z_rm, and z_lm if ``lm``, by the gradients of ``sum mixed_grad log P_y +
    reward_grad log p_RM,y + kl_grad KL``. Returns the gradient of gate_logit (n,), or None if
    nothing is mixed.

    Args:
        rows: from :func:`log_probabilities`; it cannot be used again.
        mixed_grad, reward_grad, kl_grad: (n,), upstream gradients. reward_grad is None if
            rows.reward is; kl_grad is None if the KL is not in the loss.
    """
    if kl_grad is None:
        return _log_probs_backward_(rows, mixed_grad, reward_grad, lm)
    gates = []
    # A few rows at a time, since both gradients of a row need its logits.
    for start in range(0, len(rows.labels), KL_ROWS):
        part = _part(rows, slice(start, start + KL_ROWS))
        upstream = [
            None if x is None else x[start : start + KL_ROWS]
            for x in (mixed_grad, reward_grad, kl_grad)
        ]
        z_lm, z_rm, gate = _kl_gradients(part, upstream[2], lm)
        of_log_probs = _log_probs_backward_(part, upstream[0], upstream[1], lm)
        part.z_rm += z_rm
        if lm:
            part.z_lm += z_lm
        gates.append(gate if of_log_probs is None else gate + of_log_probs)
    return torch.cat(gates)


def _log_probs_backward_(
    rows: Rows, mixed_grad: Tensor, reward_grad: Tensor | None, lm: bool
) -> Tensor | None:
    """:func:`gradients_` without the KL."""
    gate = None
    if rows.mixed is not None or rows.reward is not None:
        gate = _log_prob_gradients_(rows, mixed_grad, reward_grad, lm=lm and rows.mixed is not None)
    else:
        rows.z_rm.zero_()
    if lm and rows.mixed is None and rows.z_lm is not None:
        rows.z_lm.zero_()
    return gate


def _part(rows: Rows, of: slice) -> Rows:
    """Some of the rows, as views."""

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[of]

    normalizers = rows.normalizers
    return replace(
        rows,
        z_lm=cut(rows.z_lm), z_rm=rows.z_rm[of], gate_logit=rows.gate_logit[of],
        labels=rows.labels[of], mixed=cut(rows.mixed), reward=cut(rows.reward),
        normalizers=None if normalizers is None else normalizers[:, of].contiguous(),
    )  # fmt: skip


def _kl_gradients(rows: Rows, upstream: Tensor, lm: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of ``sum upstream KL`` with respect to z_lm (None unless ``lm``), z_rm (n, V)
    and gate_logit (n,), in new tensors.
    """
    z_lm, z_rm, gate_logit = (x.detach() for x in (rows.z_lm, rows.z_rm, rows.gate_logit))
    wanted = [z_rm.requires_grad_(), gate_logit.requires_grad_()]
    wanted += [z_lm.requires_grad_()] if lm else []
    with torch.enable_grad():
        total = (_kl(z_lm, z_rm, gate_logit, rows.options) * upstream).sum()
        found = torch.autograd.grad(total, wanted)
    return (found[2] if lm else None), found[0], found[1]


def _log_prob_gradients_(
    rows: Rows, mixed_grad: Tensor, reward_grad: Tensor | None, *, lm: bool
) -> Tensor | None:
    """Overwrite the logits by the gradients of the log-probabilities; return the gate's."""
    if rows.normalizers is not None:
        mixes = rows.mixed is not None
        gate = ops.loss_rows_backward_(
            rows.z_lm, rows.z_rm, rows.gate_logit, rows.labels, rows.normalizers, rows.mixed,
            mixed_grad if mixes else None, reward_grad, lm, *_kernel_options(rows.options),
        )  # fmt: skip
        return gate if mixes else None
    own = None if reward_grad is None else _through(rows.z_rm, reward_grad, rows)
    if rows.mixed is None:
        rows.z_rm.copy_(own)
        return None
    share, lm_only, rm_only = _shares(rows.gate_logit)
    if rows.options.mix == "probs":
        # Of two equivalent formulas, the one without cancellation for a saturated share.
        in_lm, in_rm = (
            torch.exp(_log_prob(_post(z, rows.options), rows.labels) - rows.mixed)
            for z in (rows.z_lm, rows.z_rm)
        )
        rest = torch.sigmoid(-rows.gate_logit)
        high = rows.gate_logit > 0
        of_lm = torch.where(high, rest * in_lm, 1 - share * in_rm).masked_fill(lm_only, 1.0)
        of_lm = of_lm.masked_fill(rm_only, 0.0)
        posterior = torch.where(high, 1 - rest * in_lm, share * in_rm).masked_fill(rm_only, 1.0)
        posterior = posterior.masked_fill(lm_only, 0.0)
        gate = mixed_grad * torch.where(high, rest * (1 - in_lm), share * (in_rm - 1))
        gate = gate.masked_fill(lm_only | rm_only, 0.0)
        to_rm = _through(rows.z_rm, mixed_grad * posterior, rows)
        if lm:
            rows.z_lm.copy_(_through(rows.z_lm, mixed_grad * of_lm, rows))
    else:
        dz = _through(_mixture(rows), mixed_grad, rows)
        gate = (dz * (rows.z_rm - rows.z_lm)).sum(-1) * share * torch.sigmoid(-rows.gate_logit)
        gate = torch.where(lm_only | rm_only, 0.0, gate)
        to_rm = dz * share[:, None]
        if lm:
            rows.z_lm.copy_(dz * torch.sigmoid(-rows.gate_logit)[:, None])
    rows.z_rm.copy_(to_rm if own is None else own + to_rm)
    return gate


def _kernel_options(options: LossOptions) -> tuple[bool, float, float]:
    return options.mix == "probs", options.logit_scale, options.logit_softcap


def _shares(gate_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(s, whether s is exactly 0, whether 1 - s is exactly 0)."""
    share = torch.sigmoid(gate_logit)
    return share, share == 0, torch.sigmoid(-gate_logit) == 0


def _mixture(rows: Rows) -> Tensor:
    share, lm_only, rm_only = _shares(rows.gate_logit)
    mixed = torch.sigmoid(-rows.gate_logit)[:, None] * rows.z_lm + share[:, None] * rows.z_rm
    return torch.where(lm_only[:, None], rows.z_lm, torch.where(rm_only[:, None], rows.z_rm, mixed))


def _post(z: Tensor, options: LossOptions) -> Tensor:
    return postprocess(z, options.logit_scale, options.logit_softcap)


def _log_prob(y: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(y, labels, reduction="none")


def _through(z: Tensor, upstream: Tensor, rows: Rows) -> Tensor:
    """``upstream (onehot - softmax(f(z))) f'(z)``, (n, V), in a new tensor."""
    options = rows.options
    y = _post(z, options)
    out = torch.softmax(y, -1).neg_()
    out[torch.arange(len(z), device=z.device), rows.labels] += 1.0
    out *= upstream[:, None]
    if options.logit_softcap > 0.0:
        out *= 1.0 - (y / options.logit_softcap).square()
    return out if options.logit_scale == 1.0 else out.mul_(options.logit_scale)
