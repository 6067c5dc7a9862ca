# SPDX-License-Identifier: Apache-2.0
"""Nsight Compute on one launch of the decode step: counters, and stalls by instruction."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from .processes import run_command
from .records import DID_NOT_RUN, FAILED, PASSED
from .stages import Output, python

CASES = ("bf16-1", "int4-1")  # of tools.gpu.smoke
_PAGES = (["--page", "details"], ["--page", "source", "--csv"], ["--page", "raw"])
_LONGEST_PAGE = 1_500_000  # characters; a file that is too large may not come back


def run(output: Output, end_time: float) -> tuple[str, str]:
    """Write all cases to ``ncu.txt``; returns outcome and detail."""
    tool = shutil.which("ncu")
    if tool is None:
        return DID_NOT_RUN, "ncu is not found"
    words = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            share = (end_time - time.monotonic()) / (len(CASES) - number)
            until = time.monotonic() + share
            words.append(f"{case} {_profile(output, tool, case, Path(folder) / case, until)}")
    failed = any(FAILED in word for word in words)
    return FAILED if failed else PASSED, ", ".join(words)


def _profile(output: Output, tool: str, case: str, report: Path, end_time: float) -> str:
    options = ["--clock-control", "none", "--set", "full", "--profile-from-start", "off"]
    options += ["--target-processes", "all", "--launch-count", "1", "-f", "-o", str(report)]
    command = [tool, *options, *python("tools.gpu.one_step", case)]
    done = run_command(command, (end_time - time.monotonic()) * 0.75)
    output.text("ncu.txt", f"##### {case}: measuring\n{done.text[-_LONGEST_PAGE:]}\n")
    file = f"{report}.ncu-rep"
    if done.code != 0 or not Path(file).is_file():
        return f"{FAILED} ({done.why}: {done.last_line.strip()})"
    for page in _PAGES:
        left = end_time - time.monotonic()
        if left < 1:
            return f"{PASSED}, but without the page {page[1]}"
        shown = run_command([tool, "-i", file, *page], left)
        text = shown.text[:_LONGEST_PAGE]
        output.text("ncu.txt", f"##### {case}: {' '.join(page)}\n{text}\n")
    return PASSED
