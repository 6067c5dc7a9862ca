# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a call in PyTorch's allocators, beyond what was in use before it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..measurement.timing import Contender


def peak_of(device_type: str) -> Callable[[Contender], int]:
    """The function below for a device of this type."""
    return peak_cuda_bytes if device_type == "cuda" else peak_bytes


def peak_bytes(contender: Contender) -> int:
    """Peak bytes of PyTorch's CPU allocator during a call, beyond those in use before it."""
    from torch.profiler import ProfilerActivity, profile

    contender.prepare(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        contender.call(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    in_use = peak = 0
    for event in memory:
        in_use += event["args"]["Bytes"]
        peak = max(peak, in_use)
    return peak


def peak_cuda_bytes(contender: Contender) -> int:
    """The same for the CUDA allocator of the current device."""
    contender.prepare(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
