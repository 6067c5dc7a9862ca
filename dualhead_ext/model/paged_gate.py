# SPDX-License-Identifier: Apache-2.0
"""The gate's state in the paged cache of continuous batching, where the requests of a batch are
concatenated in a single row.

The state of a position is a string of bytes: keys (H, d_k), then folded values (H,). It is stored
as the keys and values of a few extra attention layers. So paging, prefix sharing, forks and
offloading treat it like the backbone's own.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..head.controls import Controls
from ..head.request_controls import with_own_alpha
from ..ops.logits import accumulator_dtype

_FULL, _SLIDING = "full_attention", "sliding_attention"


def layer_types_of(config: Any) -> list[str]:
    """The kind of attention of each layer of a backbone."""
    if (types := getattr(config, "layer_types", None)) is not None:
        return list(types)
    kind = _FULL if getattr(config, "sliding_window", None) is None else _SLIDING
    return [kind] * config.num_hidden_layers


class PagedGate:
    """The layout of the gate's state in a paged cache, and the controls of the current batch.

    Attributes:
        config: the backbone's configuration with the gate's layers appended. transformers creates
            the cache from it.
        controls: one row for each request that gets a token in this batch. Requests without a
            control have its neutral value.
    """

    def __init__(self, head: Any, config: Any, cache_dtype: torch.dtype) -> None:
        """config: the backbone's text configuration; cache_dtype: the paged cache's."""
        from transformers.generation.continuous_batching.utils import (
            find_head_dim,
            find_num_key_value_heads,
        )

        self._probe = head.new_cache(1, 1)  # holds the weights that compute the state
        self._cache_dtype = cache_dtype
        self._page = (find_num_key_value_heads(config), find_head_dim(config))
        self._key_bytes = self._value_bytes = 0
        if head.gate.has_state:
            count, size = head.gate.num_heads, head.gate.head_dim
            self._key_bytes = count * size * head.hidden_dtype.itemsize
            self._value_bytes = count * accumulator_dtype(head.hidden_dtype).itemsize
        self._layer_bytes = 2 * math.prod(self._page) * cache_dtype.itemsize
        self._layer_count = math.ceil((self._key_bytes + self._value_bytes) / self._layer_bytes)
        self._own_types = layer_types_of(config)
        self.config = copy.deepcopy(config)
        if self._layer_count:
            self.config.num_hidden_layers += self._layer_count
            self.config.layer_types = self._own_types + [_FULL] * self._layer_count
        self.controls = Controls()

    def is_of(self, head: Any) -> bool:
        """Whether the state in the cache was computed with the head's current weights."""
        return self._probe.weights.stamp == head.new_cache(1, 1).weights.stamp

    def backbone_mask(self, mask: Any) -> Any:
        """The mask for the backbone: a single one if all its layers are of one kind."""
        return mask[self._own_types[0]] if self._one_mask(mask) else mask

    def _one_mask(self, mask: Any) -> bool:
        return isinstance(mask, dict) and len(set(self._own_types)) == 1

    def gate_logits(self, head: Any, hidden: Tensor, batch: dict[str, Any]) -> Tensor:
        """Write the state of every position of hidden (1, Q, d) into the cache, and return the gate
        logits (N, 1) at ``logits_indices`` (N,). batch: the model's arguments from transformers.

        Raises:
            RuntimeError: the head's weights have changed since the cache was made.
        """
        head.check_cache("continuous batching", self._probe, 1)
        last = batch["logits_indices"].long()
        queries = hidden[0, last][:, None]
        if not head.gate.has_state:
            return head.gate(queries)
        states = self._update(head, hidden, batch)
        q_starts = batch["cu_seq_lens_q"].long()
        k_starts = batch["cu_seq_lens_k"][_FULL].long()
        request = torch.searchsorted(q_starts[1:], last, right=True).clamp(max=len(k_starts) - 2)
        length = k_starts[request + 1] - k_starts[request]
        columns = torch.arange(int(batch["max_length_k"][_FULL]), device=hidden.device)
        index = (k_starts[request][:, None] + columns).clamp(max=len(states) - 1)
        query_column = length - (q_starts[request + 1] - last)
        k, u = self._unpack(head, states[index])
        valid = columns < length[:, None]
        return head.gate.attend(queries, query_column[:, None], k, u, valid)

    def _update(self, head: Any, hidden: Tensor, batch: dict[str, Any]) -> Tensor:
        """Write the state of hidden into the cache, and return the state of all positions of all
        requests in this batch, (S, bytes), concatenated by request.
        """
        weights = self._probe.weights
        k, u = head.gate.keys_and_values(hidden, weights.tensors["u_weight"], weights.projection)
        parts = [k[0].transpose(0, 1).flatten(1), u[0].transpose(0, 1)]
        parts = [part.contiguous().view(torch.uint8) for part in parts]
        unused = self._layer_count * self._layer_bytes - self._key_bytes - self._value_bytes
        parts.append(parts[0].new_zeros(len(parts[0]), unused))
        pages = torch.cat(parts, 1).view(self._cache_dtype)
        pages = pages.view(len(pages), self._layer_count, 2, *self._page).permute(1, 2, 3, 0, 4)
        names = ("cu_seq_lens_k", "max_length_k", "read_index", "write_index", "block_table")
        found = []
        for layer, (keys, values) in enumerate(pages, start=len(self._own_types)):
            arguments = {name: batch.get(name) for name in names}  # a copy: update changes it
            both = batch["cache"].update(keys[None], values[None], layer, arguments)
            found += [part[0].transpose(0, 1).flatten(1) for part in both]
        return torch.cat(found, 1).view(torch.uint8)

    def _unpack(self, head: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S, bytes) -> k (N, H, S, d_k), u (N, H, S)."""
        gate, end = head.gate, self._key_bytes + self._value_bytes
        k = states[..., : self._key_bytes].contiguous().view(head.hidden_dtype)
        u = states[..., self._key_bytes : end].contiguous()
        u = u.view(accumulator_dtype(head.hidden_dtype)).transpose(1, 2)
        return k.unflatten(-1, (gate.num_heads, gate.head_dim)).transpose(1, 2), u

    def rows_for(self, gate_logit: Tensor) -> Controls:
        """The batch's controls as rows for gate_logit (N, 1). transformers has a row for every
        request in the batch; those that get no token come last and are never read.
        """
        found = {}
        for name, rows in self.controls.given().items():
            padded = rows.new_zeros(len(gate_logit), *rows.shape[1:])
            padded[: len(rows)] = rows
            found[name] = padded.to(gate_logit.device)
        return with_own_alpha(Controls(**found), gate_logit)


def paged_gate(kwargs: dict[str, Any]) -> PagedGate | None:
    """The gate's layout of the paged cache in a forward's arguments, or None."""
    return getattr(kwargs.get("cache"), "paged_gate", None)
