# SPDX-License-Identifier: Apache-2.0
"""What this installation was built from and for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parent / "_build_info.json"


def _recorded() -> dict[str, Any]:
    """What the build wrote down; empty for a source tree that was never built."""
    return json.loads(_FILE.read_text()) if _FILE.is_file() else {}


def built_for() -> str:
    """ "built for torch >= 2.11 (headers of 2.13.0) on x86_64", for error messages."""
    info = _recorded()
    if not info:
        return "of unknown origin"
    minimum, headers = info["torch_minimum"], info["torch"]
    return f"built for torch >= {minimum} (headers of {headers}) on {info['machine']}"


def build_info() -> dict[str, Any]:
    """What was built, and what of it is in use here.

    Returns:
        A dict of plain values: ``version``, ``commit`` (with "-dirty" after local changes; None
        outside a checkout), ``csrc_sha256``, ``compiler``, ``machine``, ``torch_built`` (the
        headers compiled against), ``torch_minimum``, ``torch`` (the one running), ``torch_cuda``,
        ``nvcc``, ``cuda_archs`` (empty without the CUDA library), ``cpu_isa_levels`` (built, and
        run by this machine, best first), ``cpu_isa`` (chosen), ``cpu_problem`` and
        ``cuda_problem`` (why the kernels of that device are not in use, or None).
    """
    import torch

    from . import __version__, _extension

    info = _recorded()
    loaded = _extension.problem("cpu") is None
    return {
        "version": __version__,
        "commit": info.get("commit"),
        "csrc_sha256": info.get("csrc_sha256"),
        "compiler": info.get("compiler"),
        "machine": info.get("machine"),
        "torch_built": info.get("torch"),
        "torch_minimum": info.get("torch_minimum"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": info.get("nvcc"),
        "cuda_archs": info.get("cuda_archs", []),
        "cpu_isa_levels": torch.ops.dualhead.cpu_isa_levels().split(",") if loaded else [],
        "cpu_isa": torch.ops.dualhead.cpu_isa() if loaded else None,
        "cpu_problem": _extension.problem("cpu"),
        "cuda_problem": _extension.problem("cuda"),
    }
