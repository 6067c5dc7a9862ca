# SPDX-License-Identifier: Apache-2.0
"""Shards a model over the processes of a run with FSDP2.

Each decoder layer is a unit, and so is an embedding that the LM head does not share. The root unit
holds the rest: final norm, LM head, reward heads and gate, which the loss reads together. Outside a
forward pass, parameters are DTensors. Everything here is collective: all processes take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from ..model.fingerprint import keep_marks


@torch.no_grad()
def shard(model: Any, accelerator: Any) -> None:
    """Shard a model that is prepared for training, in place, before its optimizer is made. The
    first process's heads are copied to all processes, and so is the backbone if accelerate loaded
    it only there (``fsdp_cpu_ram_efficient_loading``).

    Raises:
        ValueError: no module has the class of a decoder layer.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    # A frozen backbone keeps no activations; the units that accelerate would wrap are wrapped here.
    plugin.activation_checkpointing, plugin.auto_wrap_policy = False, None
    common = {"mesh": mesh, "shard_placement_fn": _placement(accelerator, mesh)}
    layers = dict(common, reshard_after_forward=plugin.reshard_after_forward)
    layers["mp_policy"] = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    units = [(layer, layers) for layer in _layers(model, plugin.transformer_cls_names_to_wrap)]
    embedding = model.get_input_embeddings()
    if embedding.weight is not model.lm_head_module.weight:
        units.append((embedding, layers))
    # Heads compute in their own dtype, whatever the backbone's policy is.
    units.append((model, dict(common, reshard_after_forward=True)))
    done: set[Tensor] = set()
    for unit, options in units:
        own = [p for p in unit.parameters() if p not in done]
        done.update(own)
        _send(unit, own, plugin.cpu_ram_efficient_loading, accelerator.device)
        with keep_marks(unit):
            fully_shard(unit, **options)
        done.update(unit.parameters())
    register_fsdp_forward_method(model, "training_hidden_states")
    accelerator._models.append(model)  # evaluation would prepare it, which FSDP2 refuses


def _layers(model: Any, names: list[str] | None) -> list[nn.Module]:
    """The modules of the named classes; default: the backbone's decoder layers."""
    names = names or list(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"DualHeadTrainer: FSDP2 found no module of the classes {', '.join(names) or '(none)'} "
            "in the backbone; name its layers' class by fsdp_transformer_layer_cls_to_wrap"
        )
    return found


def _placement(accelerator: Any, mesh: Any) -> Any:
    """The dimension along which FSDP shards a parameter: the first, unless that is the number of
    objectives or 1. Other dimensions must be divisible by the number of shards.
    """
    count = accelerator.num_processes if mesh is None else mesh.shape[-1]

    def placement(parameter: nn.Parameter) -> Shard:
        shape = parameter.shape
        dims = range(1, len(shape)) if len(shape) == 3 or shape[0] < count else ()
        return Shard(next((dim for dim in dims if shape[dim] % count == 0), 0))

    return placement


def _send(unit: nn.Module, own: Sequence[Tensor], everything: bool, device: torch.device) -> None:
    """Copy trained parameters, or everything, from the first process to all others."""
    tensors = [p for p in own if everything or p.requires_grad]
    for tensor in [*tensors, *(unit.buffers() if everything else ())]:
        on_device = tensor.to(device, copy=True).contiguous()
        torch.distributed.broadcast(on_device, 0)
        tensor.data = on_device
