# SPDX-License-Identifier: Apache-2.0
"""Which calls of ``generate()`` the fused decoding loop supports, and their options."""

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
from .hf_cache import cache_in

# Processor -> the step's filter, in the order in which the step applies them. A processor's
# attribute has the same name.
_FILTERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
# Options that ask for outputs which the fused loop does not compute.
_NEEDS_LOGITS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class Decoding:
    """How one call of ``generate()`` decodes. It is passed to the model's forward, which sets
    ``knows_f``.

    Attributes:
        fused: True requires the fused loop, False forbids it, None leaves it to the options.
        asked: the seeds (B,) of the requests, or the generator that draws them.
        keep_cache: whether the cache is the caller's, so that no step too many may run.
        sampling: filters and seeds as rows, once the loop has begun.
        knows_f: whether the backbone's f on the prompt's logits equals the step's f.
        begun: whether the fused loop runs. Other loops raise if the fused loop is required.
    """

    fused: bool | None = None
    asked: Sampling = GREEDY
    keep_cache: bool = False
    sampling: Sampling | None = None
    knows_f: bool | None = None
    begun: bool = False

    @property
    def demand(self) -> str | None:
        """The first given argument of ``generate()`` that needs the fused loop, or None."""
        asked = self.asked
        named = {"fused=True": self.fused, "seeds": asked.seeds, "generator": asked.generator}
        given = (name for name, value in named.items() if value is not None and value is not False)
        return next(given, None)

    def compare(self, expected: Tensor, logits: Tensor) -> None:
        """Note in ``knows_f`` whether the backbone's ``logits`` equal those of the step."""
        same = expected.shape == logits.shape and torch.allclose(
            expected, logits.to(expected), rtol=1e-4, atol=1e-4, equal_nan=True
        )
        self.knows_f = same and self.knows_f is not False

    def refuse(self, obstacle: str) -> None:
        """Raise ValueError if the fused loop is required, since ``obstacle`` rules it out."""
        if self.demand is not None:
            raise ValueError(
                f"generate: {self.demand} needs the fused decoding loop, which {obstacle} rules out"
            )


def filters_of(processors: list, do_sample: bool) -> dict[str, float] | str:
    """The step's filters that are equivalent to these logits processors, or the name of a processor
    that has no equivalent.
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
    """What prevents the fused loop in a greedy or sampled call of ``generate()``; None if nothing
    does.
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
    if not isinstance(cache_in(model_kwargs), Cache):
        return "a cache that is not a transformers Cache"
    filters = filters_of(processors, config.do_sample)
    return filters if isinstance(filters, str) else None
