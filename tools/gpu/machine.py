# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.gpu.machine DEVICE``: do the compiled libraries load, and what is this machine?

The last line is JSON: "missing", why there is no GPU to check, or null; "problem", why the
libraries cannot be used, or null; "arch", the GPU's architecture; "import_seconds"; "environment",
as in results files. It runs in its own process, so that the libraries can be rebuilt afterwards.
"""

from __future__ import annotations

import json
import sys
import time


def describe(device: str) -> dict:
    """The content of the last line."""
    start = time.monotonic()
    try:
        import torch
    except ImportError:
        return {"missing": f"torch is not installed in the environment of {sys.executable}"}
    if device == "cuda" and torch.version.cuda is None:
        return {"missing": f"torch {torch.__version__} is built without CUDA"}
    if device == "cuda" and not torch.cuda.is_available():
        return {"missing": f"torch {torch.__version__} finds no CUDA device"}

    from dualhead_ext.measurement import machine
    from dualhead_ext.ops import library

    seconds = time.monotonic() - start
    problem = library.problem("cpu") or (library.problem(device))
    if device == "cuda" and problem is None:
        torch.zeros(8, device="cuda").add_(1).cpu()  # a context can be made
    sys.path.insert(0, "_build")
    from libraries import csrc_hash

    environment = {} if problem else machine.describe(device)
    environment["sources_sha256"] = csrc_hash()
    return {
        "missing": None,
        "problem": problem,
        "arch": _arch() if device == "cuda" else None,
        "import_seconds": round(seconds, 1),
        "environment": environment,
    }


def _arch() -> str:
    """ "9.0a": as TORCH_CUDA_ARCH_LIST takes it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' * (major == 9)}"


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1])))
