# SPDX-License-Identifier: Apache-2.0
"""The gate's state as one more layer of a Hugging Face Cache, so that beams, cropping, repetition
and reuse over several turns reach it: kept beside the Cache it would silently go wrong under beam
search.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..head.cache import GateCache

# Columns that a growing layer starts with; it doubles, so that appending costs O(1) per token.
FIRST_CAPACITY = 64


class GateLayer(CacheLayerMixin):
    """Holds the very :class:`GateCache` that the head decodes with. Grows as needed."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False  # its shapes are the head's, not the backbone's

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
        """Nothing to do: the cache inside is made by the head."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Refused: only the gated head writes here."""
        raise RuntimeError(
            "GateLayer.update: the gate's layer is filled by the gated lm_head alone"
        )

    def get_seq_length(self) -> int:
        """Columns filled, padding included."""
        return self.gate_cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns after ``query_length`` more, offset 0)."""
        return self.gate_cache.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def offload(self) -> None:
        """Stays where it is: it is a hundredth of the backbone's cache."""

    def prefetch(self) -> None:
        """See :meth:`offload`."""

    def reset(self) -> None:
        """Forget everything, keep the memory."""
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
    """Of fixed size, for compiled decoding: the device counts its columns, its tensors stay where
    they are.
    """

    is_compileable = True

    def __init__(self, gate_cache: GateCache) -> None:
        super().__init__(gate_cache)
        if not torch.compiler.is_compiling():
            # As StaticLayer does: without it, a CUDA graph is skipped because its inputs are
            # mutated.
            for name in ("k", "u", "valid", "length", "draws"):
                tensor = getattr(gate_cache, name)
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def make_room(self, count: int) -> None:
        """Raise ValueError unless there is room."""
        self.gate_cache.require_room("generate", count)

    def get_max_length(self) -> int:
        """S."""
        return self.gate_cache.max_length


def gate_layer(cache: Cache) -> GateLayer | None:
    """The gate's layer of a Cache, if it has one. It is the last."""
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, GateLayer) else None


def columns_of(cache: Cache) -> int:
    """Columns that a backbone's cache holds; 0 where it cannot say: recurrent layers alone (Mamba)
    count none.
    """
    if not any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return 0
