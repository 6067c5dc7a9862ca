# SPDX-License-Identifier: Apache-2.0
"""Packed (padding-free) batches in training: all sequences lie in a single row, and each starts at
``position_ids`` 0.

The backbone, which does nearly all of the work, processes no padding. The gate and the loss get
separate rows again; the loss drops everything but response tokens before its products anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Relative: attention across sequences changes hidden states by about 100 %, bf16 rounding by 1 %.
_LEAK = 0.05


@dataclass
class Rows:
    """The positions of the R sequences in a packed row.

    Attributes:
        index: (R, T), the packed column of each position; arbitrary for padding.
        valid: (R, T) bool, False for padding on the right.
    """

    index: Tensor
    valid: Tensor

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, N, ...) -> (R, T, ...)."""
        return packed[0][self.index]


def packed_rows(position_ids: Tensor | None) -> Rows | None:
    """The sequences of packed position_ids (1, N); None if nothing is packed.

    Raises:
        NotImplementedError: packed sequences in more than one row. ValueError: positions that do
            not count up from 0 in each sequence.
    """
    if position_ids is None or not (position_ids.diff(dim=-1) < 0).any():
        return None
    if position_ids.dim() != 2 or position_ids.shape[0] != 1:
        raise NotImplementedError(
            "DualHeadForCausalLM.forward: packed position_ids must be in one row (1, N), got "
            f"{tuple(position_ids.shape)}"
        )
    positions = position_ids[0]
    starts = (positions == 0).nonzero().squeeze(-1)
    ends = torch.cat((starts[1:], starts.new_tensor([len(positions)])))
    columns = torch.arange(int((ends - starts).max()), device=positions.device)
    index, lengths = starts[:, None] + columns, ends - starts
    rows = Rows(index.clamp(max=len(positions) - 1), columns < lengths[:, None])
    counted = torch.where(rows.valid, positions[rows.index], columns)
    if starts[0] != 0 or not bool((counted == columns).all()):
        raise ValueError(
            "DualHeadForCausalLM.forward: packed position_ids must count up from 0 in each sequence"
        )
    return rows


@torch.no_grad()
def check_packing(decoder: Callable[..., tuple], embeddings: Any) -> None:
    """Run the backbone on two short sequences, packed and alone.

    Raises:
        NotImplementedError: the hidden states differ, so its layers attend across sequences.
    """
    ids = torch.arange(12, device=embeddings.weight.device)[None] % embeddings.num_embeddings
    parts = ids[:, :5], ids[:, 5:]
    positions = torch.cat([torch.arange(p.shape[1], device=ids.device) for p in parts])[None]

    def hidden(ids: Tensor, positions: Tensor) -> Tensor:
        return decoder(input_ids=ids, position_ids=positions, use_cache=False)[0].float()

    packed = hidden(ids, positions)[:, 5:]
    alone = hidden(parts[1], positions[:, 5:])
    error = float((packed - alone).norm() / alone.norm())
    if not error <= _LEAK:
        raise NotImplementedError(
            "DualHeadForCausalLM.forward: this backbone's layers look across packed sequences "
            f"(hidden states change by {error:.0%}); pad the batch instead"
        )
