# SPDX-License-Identifier: Apache-2.0
"""The systems that change a backbone's distribution. Each has one strength; the suite sets it so
that all systems are equally far from the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ...head.dual_head import DualHead
from ..decoding import TrajectoryGuidance
from ..rollout import Prefix, decode_step


class GatedPolicy:
    """A gated head: ``strength`` scales alpha.

    Args:
        head: a gated head that shares the backbone's LM head.
        strength: s.
        objective_weights: (K,).
    """

    def __init__(
        self,
        head: DualHead,
        strength: float,
        objective_weights: Sequence[float] | None = None,
    ) -> None:
        self._head = head
        self._controls: dict[str, Any] = {"strength": float(strength)}
        if objective_weights is not None:
            self._controls["objective_weights"] = torch.tensor(list(objective_weights))

    def begin(self, prefix: Prefix, new_tokens: int) -> None:
        rows, length = prefix.mask.shape
        self._cache = self._head.new_cache(rows, length + new_tokens)
        if length > 1:  # the last position is read by the first call
            self._head.prefill(prefix.hidden[:, :-1], self._cache, prefix.mask[:, :-1])

    def __call__(
        self, token: Tensor | None, hidden: Tensor, z_lm: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = self._head.prefill(hidden[:, None], self._cache, mask, **self._controls)
        return out.logits[:, 0], out.alpha[:, 0]


class _Second:
    """A second model that reads the same text with its own cache."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def begin(self, prefix: Prefix, new_tokens: int) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._first = prefix.ids

    def logits(self, token: Tensor | None, mask: Tensor) -> Tensor:
        ids = self._first if token is None else token[:, None]
        hidden = decode_step(self._model, ids, mask, self._cache)[:, -1]
        return self._model.get_output_embeddings()(hidden).float()


class GuidedPolicy(_Second):
    """GenARM: ``log pi = log pi_LM + strength (log pi_r - log pi_LM)``, normalised. This is the
    paper's product at the temperature for which strength 0 gives the backbone and 1 the reward
    model.
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__(model)
        self._strength = strength

    def __call__(
        self, token: Tensor | None, hidden: Tensor, z_lm: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        q, r = z_lm.log_softmax(-1), self.logits(token, mask).log_softmax(-1)
        return q + self._strength * (r - q), None


class TunedPolicy(_Second):
    """A model with an adapter (DPO): ``strength`` scales the adapter."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__(model)
        scale_adapter(model, strength)

    def __call__(
        self, token: Tensor | None, hidden: Tensor, z_lm: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        return self.logits(token, mask), None


def scale_adapter(model: nn.Module, strength: float) -> None:
    """Scale a LoRA adapter to ``strength`` times its trained effect.

    Raises:
        ValueError: the model has no adapter.
    """
    from peft.tuners.lora import LoraLayer

    found = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not found:
        raise ValueError(f"scale_adapter: {type(model).__name__} must have a LoRA adapter")
    for layer in found:
        for name in layer.active_adapters:
            layer.set_scale(name, strength)


class SearchPolicy:
    """ARGS: samples from the backbone's k likeliest tokens, whose logits are increased by
    ``strength`` times the reward of the text with that token appended.
    """

    def __init__(self, model: PreTrainedModel, strength: float, k: int = 10) -> None:
        self._model, self._strength, self._k = model, strength, k

    def begin(self, prefix: Prefix, new_tokens: int) -> None:
        self._ids = prefix.ids
        self._guide = TrajectoryGuidance(self._model, self._strength, self._k, prefix.mask)

    def __call__(
        self, token: Tensor | None, hidden: Tensor, z_lm: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        if token is not None:
            self._ids = torch.cat((self._ids, token[:, None]), 1)
        return self._guide(self._ids, z_lm), None
