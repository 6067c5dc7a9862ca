# SPDX-License-Identifier: Apache-2.0
"""Fixtures: instruction sets and dtypes of the CPU's step."""

from __future__ import annotations

import pytest
import torch
from decode_cases import CPU_ISAS, forced_isa

from dualhead_ext import ops

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=CPU_ISAS)
def isa(request):
    """Run the test once for each instruction set."""
    with forced_isa(request.param):
        assert ops.cpu_isa() == request.param
        yield request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param
