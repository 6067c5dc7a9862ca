# SPDX-License-Identifier: Apache-2.0
"""The public import path of :func:`fused_sample`."""

from .model.fused_loop import fused_sample

__all__ = ["fused_sample"]
