# SPDX-License-Identifier: Apache-2.0
"""Liger's tests of its fused losses, with the gated loss in their place, on the CPU: cross-entropy
after a linear layer, CPO and SimPO, with their gradients, biases, ignored tokens, label smoothing,
frozen weights, half precision.

Liger has one matrix, the gated loss two: it is passed as both, and their gradients add up. The gate
is closed, so that the mixture is the LM head's distribution.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualhead_ext.functional import dual_head_loss

from .sources import source_of

# What the tests import of Liger; only what is replaced below is used.
LIGER_MODULES = (
    "liger_kernel", "liger_kernel.chunked_loss", "liger_kernel.chunked_loss.cpo_loss",
    "liger_kernel.chunked_loss.functional", "liger_kernel.chunked_loss.simpo_loss",
    "liger_kernel.ops", "liger_kernel.ops.cross_entropy", "liger_kernel.ops.utils",
    "liger_kernel.transformers", "liger_kernel.transformers.cross_entropy",
    "liger_kernel.transformers.functional",
    "liger_kernel.transformers.fused_linear_cross_entropy", "liger_kernel.utils",
)  # fmt: skip
UPSTREAM = ("transformers.test_fused_linear_cross_entropy", "chunked_loss.test_cpo_loss",
            "chunked_loss.test_simpo_loss")  # fmt: skip


class CrossEntropy(nn.Module):
    """With the signature of LigerFusedLinearCrossEntropyLoss."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        softcap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.ignored, self.reduction, self.softcap = ignore_index, reduction, softcap

    def forward(self, weight: Tensor, x: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        mask = target != self.ignored
        loss = dual_head_loss(
            x[None],
            target[None],
            mask[None],
            torch.full((1, len(x)), -torch.inf),
            lm_weight=weight,
            lm_bias=bias,
            reward_weight=torch.zeros_like(weight, requires_grad=False),
            lambda_r=0.0,
            lambda_g=0.0,
            logit_softcap=self.softcap or 0.0,
            lm_reduction="mean",
            num_pairs=0,
        ).loss
        return loss if self.reduction == "mean" else loss * mask.sum()


class Preference(nn.Module):
    """With the signatures of LigerFusedLinearCPOLoss and LigerFusedLinearSimPOLoss."""

    reduction, gamma = "sum", 0.0

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.ignored, self.alpha = ignore_index, alpha
        self.options = {
            "beta_r": beta,
            "gamma": self.gamma if gamma is None else gamma,
            "label_smoothing": label_smoothing,
        }

    def forward(self, weight: Tensor, x: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        mask = target != self.ignored
        out = dual_head_loss(
            x,
            target,
            mask,
            torch.full(target.shape, -torch.inf),
            lm_weight=weight,
            lm_bias=bias,
            reward_weight=weight,
            reward_bias=bias,
            lambda_g=0.0,
            lm_reduction="mean",
            pref_reduction=self.reduction,
            **self.options,
        )
        pairs = len(x) // 2
        logps = [out.chosen_logps, out.rejected_logps]
        if self.reduction == "mean":
            counts = mask.sum(1)
            logps = [logps[0] / counts[:pairs], logps[1] / counts[pairs:]]
        with torch.no_grad():  # the mean logits, which the gated loss does not have
            logits = nn.functional.linear(x, weight, bias).float()
            means = (logits[:pairs].mean(), logits[pairs:].mean())
        return out.loss, (*logps, *means, out.lm_loss, out.chosen_rewards, out.rejected_rewards)


class SimPO(Preference):
    reduction, gamma = "mean", 0.5


def preference(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
    return Preference()(weight, x, target, bias)


def simpo(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
    return SimPO()(weight, x, target, bias)


def applied(function: Any) -> type:
    """A class with ``function`` as its ``apply``, as an autograd function has."""
    return type("Function", (), {"apply": staticmethod(function)})


REPLACED: dict[str, Any] = {
    "LigerFusedLinearCrossEntropyLoss": CrossEntropy,
    "LigerFusedLinearCPOLoss": Preference,
    "LigerFusedLinearCPOFunction": applied(preference),
    "liger_fused_linear_cpo": preference,
    "LigerFusedLinearSimPOLoss": SimPO,
    "LigerFusedLinearSimPOFunction": applied(simpo),
    "liger_fused_linear_simpo": simpo,
    "infer_device": lambda: "cpu",
    "is_hip": lambda: False,
}


class Absent(types.ModuleType):
    """A module of Liger that is not loaded: its names are replaced, or empty classes."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return REPLACED.get(name) or type(name, (), {})


@contextlib.contextmanager
def liger_absent() -> Any:
    """``liger_kernel`` is what :class:`Absent` gives, and ``test`` is Liger's folder."""
    package = types.ModuleType("test")
    package.__path__ = [str(source_of("liger-kernel") / "test")]
    added = {name: Absent(name) for name in LIGER_MODULES} | {"test": package}
    before = {name: sys.modules.pop(name) for name in added if name in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n in added or n.startswith("test.")]:
            del sys.modules[name]
        sys.modules.update(before)


with liger_absent():
    for _name in UPSTREAM:
        _tests = vars(importlib.import_module(f"test.{_name}"))
        _short = _name.rpartition("test_")[2]
        for _key, _test in _tests.items():
            if _key.startswith("test_"):
                globals()[_key.replace("test_", f"test_{_short}_", 1)] = _test
