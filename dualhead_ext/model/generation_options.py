# SPDX-License-Identifier: Apache-2.0
"""Which calls of ``generate()`` the fused decoding loop can take, and what it is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..head.controls import GREEDY, Sampling

# Processor -> the filter of the step, which is also its attribute, in the order in which the step
# applies them.
_FILTERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
# Options that ask for what the fused loop does not make.
_NEEDS_LOGITS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class Decoding:
    """How one call of ``generate()`` decodes; passed to the model's forward, which notes what it
    finds there.

    Attributes:
        fused: True forces the fused loop, False forbids it, None leaves it to the options.
        asked: the seeds (B,) of the requests, and the generator that draws them where there are
            none.
        keep_cache: the caller's own cache, which must not see a step too many.
        sampling: once the loop has begun, the rows by which the step chooses a token.
        knows_f: whether what the backbone did to the prompt's logits is what the step does.
        begun: whether the fused loop has it; in any other loop a demand for it is an error.
    """

    fused: bool | None = None
    asked: Sampling = GREEDY
    keep_cache: bool = False
    sampling: Sampling | None = None
    knows_f: bool | None = None
    begun: bool = False

    @property
    def demand(self) -> str | None:
        """The argument of ``generate()`` that only the fused loop can honour, if one was given."""
        asked = self.asked
        named = {"fused=True": self.fused, "seeds": asked.seeds, "generator": asked.generator}
        given = (name for name, value in named.items() if value is not None and value is not False)
        return next(given, None)

    def compare(self, expected: Tensor, logits: Tensor) -> None:
        """Note whether the backbone's ``logits`` are those that the step would choose from."""
        same = expected.shape == logits.shape and torch.allclose(
            expected, logits.to(expected), rtol=1e-4, atol=1e-4, equal_nan=True
        )
        self.knows_f = same and self.knows_f is not False

    def refuse(self, obstacle: str) -> None:
        """Raise ValueError if the fused loop was asked for but ``obstacle`` is in the way."""
        if self.demand is not None:
            raise ValueError(
                f"generate: {self.demand} needs the fused decoding loop, which {obstacle} rules out"
            )


def filters_of(processors: list, do_sample: bool) -> dict[str, float] | str:
    """Arguments of the step that do what these logits processors do, or the name of one that the
    step cannot stand in for.
    """
    order, found = list(_FILTERS), {}
    last = -1
    for processor in processors:
        kind = type(processor)
        usual = getattr(processor, "filter_value", -torch.inf) == -torch.inf
        usual = usual and getattr(processor, "min_tokens_to_keep", 1) == 1
        if not do_sample or kind not in _FILTERS or not usual or order.index(kind) <= last:
            return kind.__name__
        last = order.index(kind)
        name = _FILTERS[kind]
        found[name] = getattr(processor, name)
    return found


def obstacle(
    config: Any, processors: list, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> str | None:
    """What of a call of ``generate()``, greedy or sampled, the fused loop cannot do; None if it can
    do all of it.
    """
    for name in _NEEDS_LOGITS:
        if getattr(config, name, None):
            return name
    if config.is_assistant:
        return "being an assistant model"
    if synced_gpus:
        return "synced_gpus"
    if not config.use_cache:
        return "use_cache=False"
    if not isinstance(model_kwargs.get("past_key_values"), Cache):
        return "a cache that is no transformers Cache"
    filters = filters_of(processors, config.do_sample)
    return filters if isinstance(filters, str) else None
