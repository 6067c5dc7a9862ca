# SPDX-License-Identifier: Apache-2.0
"""Runs torchao_cases.py in a process of its own.

torchao is installed apart from the other packages: transformers imports it wherever it finds it,
which writes to stderr.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APART = ROOT / ".venv" / "torchao"  # where `make install` puts it


@pytest.mark.slow
def test_torchao_cases():
    if not APART.is_dir() and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    path = os.pathsep.join([str(APART), *filter(None, [os.environ.get("PYTHONPATH")])])
    cases = Path(__file__).parents[1] / "torchao_cases.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 22
