# SPDX-License-Identifier: Apache-2.0
"""The contenders of the training loss benchmark and their operands.

Contenders, over the same hidden states; every token is a response token:

- ``dualhead``: :mod:`dualhead_ext.loss.chunked`.
- ``eager``: :mod:`.eager_loss`, the same objective in plain PyTorch.
- ``compile``: ``eager`` under ``torch.compile``.
- ``torch_chunked``: ``torch.nn.functional.linear_cross_entropy``, chunked, over
  ``[(1 - a) h; a h]`` and ``[W_LM; W_RM]``. It computes the language model term alone: no
  preference term, and always a gradient of W_LM. Left out if PyTorch lacks the function.
- ``liger``: Liger-Kernel's fused linear cross-entropy over the same, on CUDA, if installed.

bf16 means the same as in training: hidden states and a frozen LM head in bf16, trained weights in
fp32, under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss import chunked
from ..loss.heads import Heads
from ..loss.pairs import Pairing
from ..loss.terms import LossOptions
from ..model.packing import packed_rows
from . import eager_loss
from .cases import FORMATS
from .loss_cases import LossCase

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
except ImportError:
    liger = None

Call = Callable[[], Tensor]


class Batch:
    """Random operands of a case.

    Attributes:
        hidden: (R, T, d), or packed (1, N, d).
        gate_logit, labels: of the same shape without d.
        lm_weight: (V, d).
        reward_weight: (K, V, d).
        leaves: name -> tensor that gets a gradient.
        autocast: whether products are in bf16 under autocast.
    """

    def __init__(self, case: LossCase, device_type: str = "cpu") -> None:
        generator = torch.Generator(device_type).manual_seed(0)
        on: dict[str, Any] = {"generator": generator, "device": device_type}

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, **on)

        self.case, self.device_type = case, device_type
        dtype = FORMATS[case.format]
        self.autocast = dtype == torch.bfloat16
        shape = self._lay_out(case)
        self.hidden = normal(*shape, case.d).to(dtype)
        self.labels = torch.randint(case.V, shape, **on)
        self.gate_logit = normal(*shape)
        lm_weight = normal(case.V, case.d) / case.d**0.5
        noise = normal(case.objectives, case.V, case.d) / case.d**0.5
        frozen = lm_weight.to(dtype)
        self.reward_weight = frozen.float() + 0.1 * noise
        self.lm_weight = frozen.float() if "lm" in case.gradients else frozen
        self.objective = None
        if case.objectives > 1:
            self.objective = torch.arange(case.pairs) % case.objectives
        wanted = {
            "gate_logit": self.gate_logit,
            "reward_weight": self.reward_weight if "reward" in case.gradients else None,
            "lm_weight": self.lm_weight if "lm" in case.gradients else None,
            "hidden": self.hidden if "hidden" in case.gradients else None,
        }
        self.leaves = {n: x.requires_grad_() for n, x in wanted.items() if x is not None}

    def _lay_out(self, case: LossCase) -> tuple[int, int]:
        """Set the mask and the packing; return the shape of the operands without d."""
        lengths = case.lengths()
        shape = (case.rows, max(lengths))
        self.mask = torch.ones(shape, dtype=torch.bool, device=self.device_type)
        self.packed = None
        if case.packed:
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            self.packed = packed_rows(positions.to(self.device_type))
            self.mask, shape = self.packed.valid, (1, case.tokens)
        return shape

    def in_rows(self, values: Tensor) -> Tensor:
        """Values as rows (R, T, ...), unpacked as the model does it for the loss."""
        return values if self.packed is None else self.packed.unpack(values)

    def objective_value(
        self, function: Callable[..., Any], options: LossOptions | None = None
    ) -> Tensor:
        """The loss of all terms computed by ``function``, a ``dual_head_loss``."""
        heads = Heads(self.lm_weight, None, self.reward_weight, None, None)
        rows = [self.in_rows(x) for x in (self.hidden, self.labels)]
        pairs = [(p, self.case.pairs + p) for p in range(self.case.pairs)]
        objective = None if self.objective is None else self.objective.tolist()
        pairing = Pairing(len(self.mask), pairs, objective)
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            return function(
                *rows, self.mask, self.in_rows(self.gate_logit), heads, options or LossOptions(),
                pairing,
            ).loss  # fmt: skip

    def language_model_term(self, cross_entropy: Callable[..., Tensor]) -> Tensor:
        """The language model term by a fused cross-entropy (hidden, weight, labels) -> sum."""
        dtype, count = self.hidden.dtype, self.case.lm_tokens
        hidden = self.hidden.flatten(0, 1)[:count]
        share = torch.sigmoid(self.gate_logit.flatten()[:count])[:, None].to(dtype)
        both = torch.cat(((1 - share) * hidden, share * hidden), -1)
        one = self.case.objectives == 1  # a mean of one head would copy it
        reward = self.reward_weight[0] if one else self.reward_weight.mean(0)
        weight = torch.cat((self.lm_weight.to(dtype), reward.to(dtype)), 1)
        total = cross_entropy(both, weight, self.labels.flatten()[:count])
        return total / (self.case.pairs or self.case.sequences)

    def forget(self, copy: int = 0) -> None:
        """Delete the gradients, so that the next call allocates them anew."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self, call: Call) -> dict[str, Tensor]:
        """The loss and the gradients of one pass, by name; the gradients are then deleted."""
        self.forget()
        loss = call()
        loss.backward()
        found = {"loss": loss.detach()} | {n: x.grad for n, x in self.leaves.items()}
        self.forget()
        return found


def whole_calls(batch: Batch, compile: bool) -> dict[str, Call]:
    """The contenders that compute the whole objective."""
    calls = {
        "dualhead": lambda: batch.objective_value(chunked.dual_head_loss),
        "eager": lambda: batch.objective_value(eager_loss.dual_head_loss),
    }
    if compile:
        compiled = torch.compile(eager_loss.dual_head_loss)
        calls["compile"] = lambda: batch.objective_value(compiled)
    return calls


def language_model_calls(batch: Batch) -> dict[str, Call]:
    """The contenders that compute the language model term alone."""
    calls = {}
    if hasattr(F, "linear_cross_entropy"):
        calls["torch_chunked"] = lambda: batch.language_model_term(_torch_chunked)
    if liger is not None and batch.device_type == "cuda":
        calls["liger"] = lambda: batch.language_model_term(_liger)
    return calls


def eager_language_model_term(batch: Batch) -> Tensor:
    """The language model term in plain PyTorch, for comparison."""
    alone = LossOptions(lambda_r=0.0, lambda_g=0.0)
    return batch.objective_value(eager_loss.dual_head_loss, alone)


def _torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return liger(hidden, weight, labels, reduction="sum")
