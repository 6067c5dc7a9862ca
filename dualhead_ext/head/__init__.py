# SPDX-License-Identifier: Apache-2.0
"""One head: the two linear layers, the gate, its cache, and a step of decoding."""

from .dual_head import DualHead

__all__ = ["DualHead"]
