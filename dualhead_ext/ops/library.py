# SPDX-License-Identifier: Apache-2.0
"""Loading of the compiled libraries, once, when `dualhead_ext.ops` is imported.

`_C.so` defines all operators and the CPU kernels; `_C_cuda.so` adds the CUDA kernels and needs a
CUDA build of torch. A library that is missing or does not load is not an error by itself: `problem`
says in one sentence what is wrong, and `require` raises it when the operator is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent.parent
_REBUILD = "rebuild it with `pip install --no-build-isolation --no-deps .` in the source folder"
_FILES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}

_problems: dict[str, str | None] = {}


def build_record() -> dict[str, Any]:
    """The record that the build wrote beside the libraries; empty if nothing was built."""
    path = _FOLDER / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _built_for() -> str:
    """ "built for torch >= 2.11 (headers of 2.13.0) on x86_64"."""
    record = build_record()
    if not record:
        return "of unknown origin"
    minimum, headers = record["torch_minimum"], record["torch"]
    return f"built for torch >= {minimum} (headers of {headers}) on {record['machine']}"


def _load(kind: str) -> str | None:
    """Load a library. Returns what is wrong, or None."""
    path = _FOLDER / _FILES[kind]
    # Not torch.cuda.is_available(), which initialises the driver: a later fork could not use CUDA.
    if kind == "cuda" and torch.version.cuda is None:
        return f"the CUDA kernels need a CUDA build of torch; this is torch {torch.__version__}"
    if kind == "cuda" and _problems["cpu"] is not None:
        return _problems["cpu"]
    if not path.is_file():
        if kind == "cuda":
            return (
                "the CUDA kernels were not built (no nvcc was found, or DUALHEAD_CUDA=0); with the "
                f"CUDA toolkit installed, {_REBUILD}"
            )
        return f"the compiled library {path.name} is missing; {_REBUILD}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())  # torch wraps the loader's error
        return (
            f"the compiled library {path.name}, {_built_for()}, does not load in this torch "
            f"{torch.__version__} ({reason}); {_REBUILD}"
        )
    return None


def problem(kind: str) -> str | None:
    """Why the kernels of a device type are missing, as one sentence; None if they are loaded.

    kind: "cpu" (operators and CPU kernels) or "cuda".
    """
    return _problems[kind]


def require(kind: str = "cpu") -> None:
    """Raise RuntimeError with the sentence of `problem`, if there is one."""
    sentence = _problems[kind]
    if sentence is not None:
        raise RuntimeError(f"dualhead_ext: {sentence}")


for _kind in _FILES:
    _problems[_kind] = _load(_kind)
