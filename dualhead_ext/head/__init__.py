# SPDX-License-Identifier: Apache-2.0
"""The gated head: two linear layers, the gate and its cache, and the decode step."""

from __future__ import annotations

from typing import Any

__all__ = ["DualHead"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `controls` is read by the command's --help, which must not load torch.
    if name == "DualHead":
        from .dual_head import DualHead

        return DualHead
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
