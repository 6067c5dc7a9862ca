# SPDX-License-Identifier: Apache-2.0
"""``max_kl``: a cap on the KL divergence from the backbone at each token, in nats."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.logits import postprocess
from .mixture import mix_logits

# Halvings of [0, alpha]: alpha is exact to 2e-10; fp32 resolves 6e-8.
_HALVINGS = 32
# Rows (positions) at a time, since their logits are copied to float64.
_ROWS = 256


def kl_from_backbone(
    z_lm: Tensor,
    z_rm: Tensor,
    alpha: Tensor,
    mix: str = "logits",
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
) -> Tensor:
    """``KL(pi_mix || pi_LM) = sum_v pi_mix(v) (log pi_mix(v) - log pi_LM(v))`` in nats, float64.

    z_lm, z_rm (..., V) before the backbone's f; alpha (...). Returns (...).
    """
    q = torch.log_softmax(postprocess(z_lm.double(), logit_scale, logit_softcap), -1)
    mixed = mix_logits(
        z_lm.double(), z_rm.double(), alpha.double(), mix, logit_scale, logit_softcap
    )
    return _kl(mixed, q)


def _kl(logits: Tensor, q: Tensor) -> Tensor:
    """KL of ``softmax(logits)`` from the distribution with log-probabilities ``q``."""
    p = torch.log_softmax(logits, -1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def capped_alpha(
    z_lm: Tensor,
    z_rm: Tensor,
    alpha: Tensor,
    max_kl: Tensor,
    mix: str = "logits",
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
) -> Tensor:
    """The largest ``a <= alpha`` with ``KL(pi_a || pi_LM) <= max_kl``, by bisection in float64. An
    alpha within the cap is returned unchanged; max_kl 0 gives 0.

    The KL grows with a, so there is a largest one. In the probability mix the KL is convex in a,
    with its minimum 0 at a = 0. In the logits mix pi_a is a path in an exponential family, and
    ``d KL / d a = a Var_{pi_a}(z_RM - z_LM) >= 0``. With a soft cap this need not hold: the result
    is still within max_kl, but a larger a may be too.

    Args:
        z_lm, z_rm: (B, ..., V), before the backbone's f.
        alpha: (B, ...). A row that is not finite keeps its alpha.
        max_kl: (B,), >= 0; inf is no cap, NaN gives NaN.
    Returns:
        (B, ...) in the dtype of alpha, without a gradient where the cap applies.
    """
    cap = max_kl.view(-1, *(1,) * (alpha.dim() - 1)).expand_as(alpha).double()
    post = (mix, logit_scale, logit_softcap)
    with torch.no_grad():
        rows = (z_lm.flatten(0, -2), z_rm.flatten(0, -2), alpha.flatten(), cap.flatten())
        parts = zip(*(row.split(_ROWS) for row in rows), strict=True)
        low = torch.cat([_bisect(*part, *post) for part in parts]).view_as(alpha)
    low = torch.where(cap == 0, torch.zeros_like(low), low)
    capped = torch.where(torch.isnan(low), alpha, low.to(alpha.dtype))
    return torch.where(torch.isnan(cap), torch.full_like(alpha, torch.nan), capped)


def _bisect(z_lm: Tensor, z_rm: Tensor, alpha: Tensor, cap: Tensor, *post) -> Tensor:
    """The capped alpha of n rows, (n,) float64; NaN where alpha is within the cap already."""
    found = torch.full_like(alpha, torch.nan, dtype=torch.float64)
    binds = kl_from_backbone(z_lm, z_rm, alpha, *post) > cap
    if not torch.compiler.is_compiling():  # compiled code would depend on their number
        if not bool(binds.any()):
            return found
        z_lm, z_rm, alpha, cap = (x[binds] for x in (z_lm, z_rm, alpha, cap))
    z_lm, z_rm, high = z_lm.double(), z_rm.double(), alpha.double()
    low, q = torch.zeros_like(high), torch.log_softmax(postprocess(z_lm, *post[1:]), -1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        within = _kl(mix_logits(z_lm, z_rm, middle, *post), q) <= cap
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    if torch.compiler.is_compiling():
        return torch.where(binds, low, found)
    return found.masked_scatter(binds, low)
