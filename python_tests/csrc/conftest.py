# SPDX-License-Identifier: Apache-2.0
"""The report on the machine code of the built CUDA library, for several files."""

from __future__ import annotations

import json

import pytest
from build_backend import ROOT, libraries

from tools.gpu import machine_code


@pytest.fixture(scope="session")
def library_report():
    library = ROOT / "dualhead_ext" / "_C_cuda.so"
    if not library.is_file():
        pytest.skip("the CUDA library is not built (no nvcc)")
    if machine_code.find_tool() is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed Triton")
    found = machine_code.report(library)
    if not found:
        pytest.skip("the CUDA library has no code for sm_90a")
    return found


@pytest.fixture
def of_these_sources():
    record = json.loads((ROOT / "dualhead_ext" / "_build_info.json").read_text())
    if record["csrc_sha256"] != libraries.csrc_hash():
        pytest.skip("the library that is built is of other sources than csrc/: make build")
