# SPDX-License-Identifier: Apache-2.0
"""Huge pages for weights in the memory of the CPU.

A decode step reads every weight once. With pages of 4 KB the processor looks up an address for
every 4 KB that it reads, which takes time, most of all in a virtual machine. Linux merges pages to
2 MB where it is asked to: ``madvise(MADV_COLLAPSE)``, from Linux 6.1 on.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes
# Smaller weights stay in the caches, or are not worth a system call.
SMALLEST = 4 * HUGE_PAGE
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def allowed() -> bool:
    """Whether Linux has huge pages, and neither it nor ``DUALHEAD_HUGE_PAGES=0`` forbids them."""
    if sys.platform != "linux" or os.environ.get("DUALHEAD_HUGE_PAGES") == "0":
        return False
    try:
        return "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:  # a kernel without them
        return False


def use_huge_pages(weights: Iterable[Tensor | None]) -> int:
    """Move large CPU tensors to huge pages, where Linux can. Values and addresses stay, and so do
    views and ties. It takes a second or two for a gigabyte, once.

    Left as they are: weights mapped from a file, tensor subclasses, other devices.

    Returns: the number of bytes that are in huge pages now.
    """
    if torch.compiler.is_compiling() or not allowed():
        return 0
    return sum(_collapse(w.data_ptr(), w.nbytes) for w in weights if w is not None and _large(w))


def _large(weight: Tensor) -> bool:
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device.type != "cpu":
        return False
    # Rows with gaps span more than their bytes.
    return weight.is_contiguous() and weight.nbytes >= SMALLEST


# The cache: each tensor is tried once, since a system without free huge pages would search for them
# at each call. An address that a later tensor reuses is not tried again.
@lru_cache(maxsize=256)
def _collapse(start: int, size: int) -> int:
    """The bytes of [start, start + size) that are in huge pages afterwards."""
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    count = (start + size) // HUGE_PAGE * HUGE_PAGE - first
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return count if madvise(first, count, _MADV_COLLAPSE) == 0 else 0
