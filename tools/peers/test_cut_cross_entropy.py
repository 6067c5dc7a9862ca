# SPDX-License-Identifier: Apache-2.0
"""Cut cross-entropy's tests of its loss and gradients, with the gated loss in its place, on the
CPU: soft caps, shifted targets, ignored tokens, reductions, odd sizes, half precision.

The gate is closed, so that the mixture is the LM head's distribution and the loss is the plain
cross-entropy. Losses of single tokens are rewards of one-token responses, which have no gradient.
"""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

from dualhead_ext.functional import dual_head_loss

from .sources import source_of

IGNORED = -100


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    impl: str = "cce",
) -> Tensor:
    """The gated loss with the signature of cut_cross_entropy's linear_cross_entropy."""
    e, targets = (e[..., :-1, :], targets[..., 1:]) if shift else (e, targets)
    hidden, labels = e.reshape(1, -1, e.shape[-1]), targets.reshape(1, -1)
    mask = labels != IGNORED
    options = {"lambda_g": 0.0, "logit_softcap": softcap or 0.0}
    if reduction == "none":
        rows = [x[0][:, None].repeat(2, *[1] * (x.dim() - 1)) for x in (hidden, labels, mask)]
        shut = torch.full(rows[1].shape, -torch.inf)
        out = dual_head_loss(*rows, shut, lm_weight=c, reward_weight=c, **options)
        return -out.chosen_logps.view(targets.shape)
    loss = dual_head_loss(
        hidden,
        labels,
        mask,
        torch.full(labels.shape, -torch.inf, device=e.device),
        lm_weight=c,
        reward_weight=torch.zeros_like(c, requires_grad=False),
        lambda_r=0.0,
        lm_reduction="mean",
        num_pairs=0,
        **options,
    ).loss
    return loss if reduction == "mean" else loss * mask.sum()


def _tests_of(name: str) -> dict[str, object]:
    """The tests of one upstream file, on the CPU instead of CUDA."""
    folder = source_of("cut-cross-entropy")
    package = types.ModuleType("cut_cross_entropy")
    package.__path__ = [str(folder / "cut_cross_entropy")]
    package.linear_cross_entropy = linear_cross_entropy
    sys.modules["cut_cross_entropy"] = package
    path = folder / "tests" / name
    text = path.read_text().replace('"cuda"', '"cpu"')
    text = text.replace("not torch.cuda.is_available()", "False")
    module: dict[str, object] = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(text, str(path), "exec"), module)
    return {key: value for key, value in module.items() if key.startswith("test_")}


globals().update(_tests_of("test_cce_loss_forward.py"))
globals().update(_tests_of("test_cce_loss_backward.py"))
