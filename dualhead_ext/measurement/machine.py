# SPDX-License-Identifier: Apache-2.0
"""The machine that a benchmark ran on: its description and its memory bandwidth."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..build_info import build_info
from .timing import Contender, Timing, alternate, clock_of

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CPU_INFO = Path("/proc/cpuinfo")
# Linux's name of a flag -> the kernels' level, best first.
_LEVELS = {"amx_bf16": "amx", "avx512_bf16": "avx512bf16", "avx512bw": "avx512", "avx2": "avx2"}
_FLAGS = {*_LEVELS, "amx_tile", "amx_int8", "avx512f", "avx512_vnni", "avx512_vbmi", "avx_vnni"}
_FLAGS |= {"avx512_fp16", "f16c", "fma"}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# Used where Linux does not report cache sizes: more than nearly every desktop has.
_ASSUMED_CACHE_BYTES = 64 * 2**20
# Operands count as cold if they span this many last-level caches. Cache replacement is not plain
# LRU: much of a loop over twice the cache size can stay cached.
_COLD_CACHES = 4
_MATRIX_COLUMNS = 4096


def describe(device_type: str = "cpu") -> dict[str, Any]:
    """The machine and the software, as results files record them; plain values.

    ``commit`` is that of the checkout that the package runs from ("-dirty" after local changes),
    otherwise the commit it was built from. ``csrc_sha256`` is the hash of the sources that the
    library was compiled from.
    """
    built = build_info()
    return {
        **_describe_host(built),
        **(_describe_gpu() if device_type == "cuda" else {}),
    }


def _describe_host(built: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _cpu_name(),
        "kind": cpu_kind(),
        "flags": sorted(_cpu_flags() & _FLAGS),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "isa": built["cpu_isa"],
        "compiler": built["compiler"],
        "commit": _checkout_commit() or built["commit"],
        "csrc_sha256": built["csrc_sha256"],
    }


def _describe_gpu() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {
        "device": found.name,
        "host": _cpu_name(),
        "driver": _driver(),
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "last_level_cache_bytes": last_level_cache_bytes("cuda"),
    }


def _driver() -> str | None:
    """The driver version that nvidia-smi reports; None without nvidia-smi."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    """A line of CPU 0 in Linux's description; "" where it has none."""
    for line in _CPU_INFO.read_text().splitlines():
        if line.partition(":")[0].strip() == name:
            return line.partition(":")[2].strip()
    return ""


def _cpu_flags() -> set[str]:
    return set(_cpu_field("flags").split())


def cpu_kind() -> str:
    """The processor's vendor and its best instructions for these kernels, e.g. "intel-amx",
    "amd-avx512bf16", "amd-avx2". Its results are in benchmarks/results/cpu-<kind>.json.

    It does not depend on DUALHEAD_FORCE_ISA.
    """
    vendors = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
    vendor = vendors.get(_cpu_field("vendor_id"), platform.machine().lower())
    flags = _cpu_flags()
    level = next((level for flag, level in _LEVELS.items() if flag in flags), "portable")
    return f"{vendor}-{level}"


def _checkout_commit() -> str | None:
    """HEAD of the checkout that contains this package, in the format of build_info's commit."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git program
        return None
    return head.stdout.strip() + ("-dirty" if changed else "") if head.returncode == 0 else None


def last_level_cache_bytes(device_type: str = "cpu") -> int:
    """Size of a GPU's L2, or of the largest cache of CPU 0 as Linux reports it.

    On a virtual machine Linux reports the host's whole cache, which other guests share. 64 MiB
    where Linux reports none.
    """
    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        int(text[:-1]) * _UNITS[text[-1]]
        for text in (path.read_text().strip() for path in _CACHES.glob("index*/size"))
    ]
    return max(sizes, default=_ASSUMED_CACHE_BYTES)


def cold_bytes(device_type: str = "cpu") -> int:
    """Bytes that operands used in turn should span to be cold: 4 last-level caches, but at most a
    quarter of the free physical memory."""
    if device_type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        return min(_COLD_CACHES * last_level_cache_bytes("cuda"), free // 4)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_COLD_CACHES * last_level_cache_bytes(), free // 4)


@dataclass(frozen=True)
class ReadBandwidth:
    """The memory bandwidth that plain read loops reach on this machine.

    Attributes:
        gb_per_s: bandwidth of the best method, 10^9 bytes per second.
        method: name of the method with the best median.
        methods: name -> bandwidth, 10^9 bytes per second, of every method.
    """

    gb_per_s: float
    method: str
    methods: dict[str, float]

    def share(self, num_bytes: int, us: float) -> float:
        """``num_bytes`` read in ``us`` microseconds, as a fraction of this bandwidth."""
        return num_bytes / us / 1e3 / self.gb_per_s


def read_loops(buffer: Tensor) -> tuple[int, dict[str, Contender]]:
    """Four ways to read ``buffer`` once with PyTorch's own multi-threaded loops: its sum as fp32,
    its sum as int64, its dot product with itself, and its product with a vector (rows of 4096 fp32
    numbers), which on the CPU is the GEMV of the vendor's library.

    Args:
        buffer: contiguous, any dtype, at least 16384 bytes.
    Returns: the bytes that each reads, and the loops by name.
    """
    raw = buffer.view(-1).view(torch.uint8)
    row = _MATRIX_COLUMNS * 4
    if raw.numel() < row:
        raise ValueError(f"read_loops: buffer must have {row} bytes or more, got {raw.numel()}")
    raw = raw[: raw.numel() // row * row]
    numbers, vector = raw.view(torch.float32), torch.rand(_MATRIX_COLUMNS, device=raw.device)
    methods: dict[str, Callable[[], Any]] = {
        "sum of fp32": numbers.sum,
        "sum of int64": raw.view(torch.int64).sum,
        "dot product": lambda: torch.dot(numbers, numbers),
        "matrix-vector product": lambda: torch.mv(numbers.view(-1, _MATRIX_COLUMNS), vector),
    }

    def contender(name: str, method: Callable[[], Any]) -> Contender:
        return Contender(name, lambda copy: method())

    loops = {name: contender(name, method) for name, method in methods.items()}
    return raw.numel(), loops


def read_bandwidth(buffer: Tensor, seconds: float = 0.5, min_rounds: int = 5) -> ReadBandwidth:
    """How fast this machine reads memory: the best median of :func:`read_loops`, timed in turns.

    This is what such loops reach, not a hardware limit: a kernel with better prefetching can exceed
    100 %.

    Args:
        buffer: should be several times the last-level cache, such as :func:`cold_bytes`.
        seconds, min_rounds: as in :func:`dualhead_ext.measurement.timing.alternate`.
    """
    num_bytes, loops = read_loops(buffer)
    clock = clock_of(buffer.device.type)
    contenders = list(loops.values())
    timings = alternate(contenders, seconds=seconds, min_rounds=min_rounds, warmup=1, clock=clock)
    return best_read(num_bytes, timings)


def best_read(num_bytes: int, timings: dict[str, Timing]) -> ReadBandwidth:
    """The bandwidth by the timings of several loops that each read ``num_bytes``."""
    rates = {name: num_bytes / timing.us_median / 1e3 for name, timing in timings.items()}
    best = max(rates, key=rates.__getitem__)
    return ReadBandwidth(rates[best], best, rates)


def copy_bandwidth(device_type: str, num_bytes: int | None = None, min_rounds: int = 20) -> float:
    """How fast the device copies its own memory, 10^9 bytes read and written per second.

    Args:
        num_bytes: size of the buffer; default :func:`cold_bytes`.
    """
    source = torch.rand((num_bytes or cold_bytes(device_type)) // 8, device=device_type)
    target = torch.empty_like(source)
    copies = [Contender("copy", lambda copy: target.copy_(source))]
    timing = alternate(
        copies, seconds=0.3, min_rounds=min_rounds, warmup=1, clock=clock_of(device_type)
    )
    return 2 * source.nbytes / timing["copy"].us_median / 1e3
