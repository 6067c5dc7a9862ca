# SPDX-License-Identifier: Apache-2.0
"""Engines that spread a model over devices, which the heads' training does not support: found by
what was asked for, by whom ever, and by what accelerate has made of it.
"""

from __future__ import annotations

import os
from typing import Any

_WAY_OUT = (
    "the loss needs the whole heads on each device; start one process for each device by torchrun "
    "or accelerate launch --multi_gpu, and load a backbone that no device holds with device_map"
)
_VARIABLES = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}
_VARIABLES["Megatron-LM"] = "ACCELERATE_USE_MEGATRON_LM"
_TRUE = ("1", "true", "yes", "on", "y", "t")


def refuse_engines(operator: str, args: Any, accelerator: Any = None) -> None:
    """Raise ValueError if a run would use DeepSpeed, FSDP or Megatron-LM, by its arguments, the
    environment (``accelerate launch`` sets it) or the state of ``accelerator``.
    """
    for engine, option in (("DeepSpeed", "deepspeed"), ("FSDP", "fsdp")):
        if getattr(args, option, None):
            _refuse(operator, engine, f"{option}={getattr(args, option)!r}")
    for engine, variable in _VARIABLES.items():
        if os.environ.get(variable, "").lower() in _TRUE:
            _refuse(operator, engine, f"{variable}={os.environ[variable]}, from accelerate launch")
    if accelerator is None:
        return
    kind = accelerator.distributed_type.value
    for engine in _VARIABLES:
        plugin = f"{engine.lower().replace('-', '_')}_plugin"
        if getattr(accelerator.state, plugin, None) is not None:
            _refuse(operator, engine, f"accelerate's {plugin}")
    if kind in ("TP", "MEGATRON_LM"):
        _refuse(operator, kind, "accelerate's state")


def refuse_lone_processes(operator: str, accelerator: Any) -> None:
    """Raise ValueError if this is one of several processes that accelerate has not joined: each
    would train alone, and they would write to one folder.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise ValueError(
            f"{operator}: {started} processes were started, and each of them would train alone; "
            "use_cpu=True joins them on a machine without an accelerator"
        )


def _refuse(operator: str, engine: str, asked_by: str) -> None:
    raise ValueError(f"{operator}: {engine} ({asked_by}) cannot train heads: {_WAY_OUT}")
