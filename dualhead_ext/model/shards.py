# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the whole heads of a model that :mod:`dualhead_ext.train.sharding` has
sharded with FSDP2.
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
    """Whether a model is sharded over processes."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_heads(model: Any) -> Iterator[None]:
    """Context in which every process has the whole heads of a sharded model, also between forwards.
    Changes to them are lost at its end. Collective.
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
    """Dicts and lists with whole tensors instead of shards. Collective: processes with ``keep``
    False take part and get None for each tensor.
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
    """The part of a whole tensor that this process holds, if it is sharded like ``like``."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, which may be sharded."""
    if isinstance(parameter, DTensor):
        share: Any = own_share(value, parameter)
        parameter.to_local().copy_(share.to_local())
    else:
        parameter.copy_(value)
