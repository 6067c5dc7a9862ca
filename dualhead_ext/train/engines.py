# SPDX-License-Identifier: Apache-2.0
"""Detects engines that spread a model over devices and are not supported for training heads, from
the arguments, the environment and accelerate's state. FSDP2 is supported:
:mod:`dualhead_ext.train.sharding`.
"""

from __future__ import annotations

import os
from typing import Any

_WAY_OUT = (
    "shard the backbone by FSDP2 (fsdp_version: 2 in accelerate's configuration), or start one "
    "process for each device by torchrun"
)
_VARIABLES = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM"}
_TRUE = ("1", "true", "yes", "on", "y", "t")


def refuse_engines(operator: str, args: Any, accelerator: Any = None) -> None:
    """Raise ValueError if a run would use DeepSpeed, FSDP1 or Megatron-LM, or FSDP2 with an option
    that is not supported, by its arguments, the environment (``accelerate launch`` sets it) or the
    state of ``accelerator``.
    """
    if getattr(args, "deepspeed", None):
        _refuse(operator, "DeepSpeed", f"deepspeed={args.deepspeed!r}")
    for engine, variable in _VARIABLES.items():
        if _is_set(variable):
            _refuse(operator, engine, f"{variable}={os.environ[variable]}, from accelerate launch")
    if accelerator is None:
        version = os.environ.get("FSDP_VERSION", "1")
        if _is_set("ACCELERATE_USE_FSDP") and not getattr(args, "fsdp", None) and version != "2":
            asked = f"ACCELERATE_USE_FSDP=true and FSDP_VERSION={version}, from accelerate launch"
            _refuse(operator, "FSDP1", asked)
        return
    state, kind = accelerator.state, accelerator.distributed_type.value
    for engine in _VARIABLES:
        plugin = f"{engine.lower().replace('-', '_')}_plugin"
        if getattr(state, plugin, None) is not None:
            _refuse(operator, engine, f"accelerate's {plugin}")
    if kind in ("TP", "MEGATRON_LM"):
        _refuse(operator, kind, "accelerate's state")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(f"{operator}: {name}_size > 1 is not supported; leave it out")
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        _refuse_options(operator, plugin)


def _refuse_options(operator: str, plugin: Any) -> None:
    """Raise ValueError for FSDP1 and for unsupported options of FSDP2."""
    if plugin.fsdp_version != 2:
        _refuse(operator, "FSDP1", "accelerate's fsdp_plugin")
    # Compare names, to avoid importing the modules.
    if type(plugin.cpu_offload).__name__.startswith("CPUOffload"):
        raise ValueError(
            f"{operator}: FSDP2 with offload_params (cpu_offload) is not supported; cache_hidden "
            "keeps the backbone's hidden states, so that it runs once"
        )
    if "size_based" in str(plugin.auto_wrap_policy):
        raise ValueError(
            f"{operator}: FSDP2 shards by decoder layers here, SIZE_BASED_WRAP is not supported; "
            "use fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"
        )


def refuse_lone_processes(operator: str, accelerator: Any) -> None:
    """Raise ValueError if this is one of several processes that accelerate has not connected: each
    would train alone, and all would write to the same folder.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise ValueError(
            f"{operator}: {started} processes were started, and each of them would train alone; "
            "use_cpu=True joins them on a machine without an accelerator"
        )


def refuse_ignored_fsdp(operator: str, args: Any, accelerator: Any) -> None:
    """Raise ValueError if FSDP was requested for several processes but accelerate ignores it, as on
    CPUs: each process would hold the whole model.
    """
    asked = bool(getattr(args, "fsdp", None)) or _is_set("ACCELERATE_USE_FSDP")
    left_out = asked and getattr(accelerator.state, "fsdp_plugin", None) is None
    if left_out and accelerator.num_processes > 1:
        raise ValueError(
            f"{operator}: FSDP was asked for, and accelerate leaves it out on a device of the kind "
            f"{accelerator.device.type!r}; without it the same command trains with the whole model "
            "in each process"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE


def _refuse(operator: str, engine: str, asked_by: str) -> None:
    raise ValueError(f"{operator}: {engine} ({asked_by}) cannot train heads: {_WAY_OUT}")
