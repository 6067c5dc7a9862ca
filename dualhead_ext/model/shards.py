# SPDX-License-Identifier: Apache-2.0
"""Whole heads out of a model that :mod:`dualhead_ext.train.sharding` has split over processes by
FSDP2, and into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_WHOLE = "_dualhead_whole"  # attribute of a sharded model, inside of whole_heads


def is_sharded(model: Any) -> bool:
    """Whether a model is split over processes."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_heads(model: Any) -> Iterator[None]:
    """In the block every process has the whole heads of a sharded model, and they stay between
    forwards. Changes to them are lost after it. Collective.
    """
    if not is_sharded(model) or getattr(model, _WHOLE, False):
        yield
        return
    setattr(model, _WHOLE, True)
    model.set_reshard_after_forward(False, recurse=False)
    model.unshard()
    try:
        yield
    finally:
        setattr(model, _WHOLE, False)
        model.set_reshard_after_forward(True, recurse=False)
        model.reshard()


def whole_state(state: Any, keep: bool) -> Any:
    """Dicts and lists with whole tensors in the place of shards. Collective: a process that does
    not keep them takes part and gets None for them.
    """
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value, keep) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()
    return whole.cpu() if keep else None


def own_share(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds ``like``, which is a DTensor or not."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """A whole tensor into a parameter, of which this process may hold a share."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(own_share(value, parameter).to_local())
    else:
        parameter.copy_(value)
