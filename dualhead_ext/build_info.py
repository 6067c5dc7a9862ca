# SPDX-License-Identifier: Apache-2.0
"""What this installation was built from and which kernels it uses."""

from __future__ import annotations

from typing import Any


def build_info() -> dict[str, Any]:
    """How the package was built, and which of its kernels are in use on this machine.

    Returns:
        A dict of plain values: ``version``, ``commit`` (with "-dirty" after local changes; None
        outside a checkout), ``csrc_sha256``, ``compiler``, ``machine``, ``torch_built`` (the
        headers compiled against), ``torch_minimum``, ``torch`` (the one running), ``torch_cuda``,
        ``nvcc``, ``cuda_archs`` (empty without the CUDA library), ``cpu_isa_levels`` (those built
        that this machine can run, best first), ``cpu_isa`` (the chosen one), ``cpu_problem`` and
        ``cuda_problem`` (why that device's kernels are not in use, or None).
    """
    import torch

    from . import __version__
    from .ops import library

    info = library.build_record()
    loaded = library.problem("cpu") is None
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
        "cpu_problem": library.problem("cpu"),
        "cuda_problem": library.problem("cuda"),
    }
