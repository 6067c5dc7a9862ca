# SPDX-License-Identifier: Apache-2.0
"""The gate's state as an extra layer of a Hugging Face Cache. Beam search, cropping, repetition and
reuse over several turns act on all layers of a Cache, so they include the gate's state.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerateDecoderOnlyOutput

from ..head.cache import GateCache

# The initial columns of a growing layer. It doubles, so appending costs O(1) per token.
FIRST_CAPACITY = 64

# What forwards call their cache: transformers 5.24 renamed past_key_values to cache, and some
# recurrent models have a name of their own.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# What the installed transformers calls it.
_FIELDS = {field.name for field in fields(GenerateDecoderOnlyOutput)}
GENERATION_CACHE = next(name for name in CACHE_NAMES if name in _FIELDS)


def cache_argument(model: nn.Module) -> str | None:
    """The name under which a model's forward takes its cache; None if it takes none."""
    kinds: list[Any] = [kind for kind in type(model).__mro__ if "forward" in vars(kind)]
    names = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward or of ``generate()``, else None."""
    found = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward returned, else None."""
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in found if cache is not None), None)


class GateLayer(CacheLayerMixin):
    """Holds the :class:`GateCache` with which the head decodes. Grows as needed."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # the head determines its shapes, not the backbone

    def __init__(self, gate_cache: GateCache) -> None:
        super().__init__()
        self.gate_cache = gate_cache
        self.is_initialized = True

    def make_room(self, count: int) -> None:
        """Room for ``count`` more columns."""
        needed = self.gate_cache.columns + count
        if needed > self.gate_cache.max_length:
            self.gate_cache.reserve(max(needed, 2 * self.gate_cache.max_length))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the head makes the cache inside."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Raises RuntimeError: only the gated head writes here."""
        raise RuntimeError(
            "GateLayer.update: the gate's layer is filled by the gated lm_head alone"
        )

    def get_seq_length(self) -> int:
        """Columns filled, padding included."""
        return self.gate_cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of columns after ``query_length`` more, offset 0)."""
        return self.gate_cache.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def offload(self) -> None:
        """Does nothing: this layer is a hundredth of the backbone's cache."""

    def prefetch(self) -> None:
        """See :meth:`offload`."""

    def reset(self) -> None:
        """Empty the layer and keep its memory."""
        self.gate_cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns; a positive number is the length to keep,
        as older transformers pass it.
        """
        tokens_to_remove = int(tokens_to_remove)  # some versions pass a tensor
        if tokens_to_remove < 0:
            self.gate_cache.crop(max(self.gate_cache.columns + tokens_to_remove, 0))
        elif tokens_to_remove > 0:
            self.gate_cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the old row ``beam_idx[b]``."""
        self.gate_cache.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; indices or a boolean mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self.gate_cache.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self.gate_cache.repeat_interleave(repeats)


class StaticGateLayer(GateLayer):
    """A layer of fixed size for compiled decoding: the device counts its columns, and its tensors
    keep their addresses.
    """

    is_compileable = True

    def __init__(self, gate_cache: GateCache) -> None:
        super().__init__(gate_cache)
        if not torch.compiler.is_compiling():
            # As in StaticLayer. Otherwise CUDA graphs are skipped because their inputs are mutated.
            for name in ("k", "u", "valid", "length", "draws"):
                tensor = getattr(gate_cache, name)
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def make_room(self, count: int) -> None:
        """Raise ValueError unless ``count`` more columns fit."""
        self.gate_cache.require_room("generate", count)

    def get_max_length(self) -> int:
        """S."""
        return self.gate_cache.max_length


def gate_layer(cache: Cache) -> GateLayer | None:
    """The gate's layer of a Cache, or None. It is the last layer."""
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, GateLayer) else None


def columns_of(cache: Cache) -> int:
    """The number of columns in a backbone's cache; 0 if it does not count them (Mamba has recurrent
    layers only).
    """
    if not any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return 0
