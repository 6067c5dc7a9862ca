# SPDX-License-Identifier: Apache-2.0
"""The modules of _build/. It is not a package: pip puts the folder itself on the path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))

import backend  # noqa: E402
import incremental  # noqa: E402
import libraries  # noqa: E402
import toolchain  # noqa: E402
import torch_location  # noqa: E402

__all__ = ["ROOT", "backend", "incremental", "libraries", "toolchain", "torch_location"]
