# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over small decode steps and losses, for ``make gpu-check``.

Each tool is first run over a program with a bug of its kind (csrc/testing/seeded_bugs.cu). One that
does not find it, because it refuses the device or is not installed, is reported as not run: it says
nothing about our kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

from gpu_steps import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT, Outcome, run_command

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_FOUND = 86  # the exit code that we give to "errors were found"
OURS = "dualhead"  # the namespace that our kernels' names begin with
_SUMMARY = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target")


def find_tool() -> str | None:
    """compute-sanitizer on PATH, or beside nvcc."""
    found = shutil.which("compute-sanitizer")
    nvcc = shutil.which("nvcc")
    if found is None and nvcc is not None:
        beside = Path(nvcc).resolve().parent / "compute-sanitizer"
        found = str(beside) if beside.is_file() else None
    return found


def build_seeded_bugs(folder: Path, limit: float) -> tuple[Path | None, str]:
    """(program, "") or (None, why not), for the GPU that is there."""
    program = folder / "seeded_bugs"
    source = ROOT / "csrc" / "testing" / "seeded_bugs.cu"
    if shutil.which("nvcc") is None:
        return None, "nvcc is not found, which builds the seeded bugs"
    command = ["nvcc", "-std=c++17", "-arch=native", "-o", str(program), str(source)]
    done = run_command(command, limit)
    return (program, "") if done.code == 0 else (None, f"nvcc: {done.last_line}")


def reports(text: str) -> list[str]:
    """What a tool found, one text each: a line behind ``=========`` without indentation, and the
    indented ones below it."""
    found: list[str] = []
    for line in text.splitlines():
        match = re.match(r"=========( +)(\S.*)", line)
        if match is None:
            continue
        if len(match[1]) > 1:
            if found:
                found[-1] += "\n" + match[2]
        elif not match[2].startswith(_SUMMARY):
            found.append(match[2])
    return found


def counts(report: str) -> bool:
    """Whether a report is about us: it names a kernel of ours, or no kernel at all. PyTorch's own
    kernels and cuBLAS's are not ours to check."""
    return OURS in report or not re.search(r"(?m)^at |\bat .+\+0x", report)


def judge(code: int | None, text: str) -> Outcome:
    """The outcome of a tool's run over our kernels."""
    found = reports(text)
    ours = [report for report in found if counts(report)]
    if code == 0:
        return Outcome(PASSED, "")
    if code == _FOUND and not ours and found:
        return Outcome(PASSED, f"{len(found)} reports in kernels that are not ours")
    if ours:
        first = ours[0].partition("\n")[0]
        return Outcome(FAILED, f"{len(ours)} reports, the first: {first}")
    lines = text.strip().splitlines() or ["no output"]
    return Outcome(FAILED, f"exit code {code}: {lines[-1][:200]}")


def sanitize(tool: str, folder: Path, limit: float, target: list[str] | None = None) -> Outcome:
    """Run one tool, first over its seeded bug, then over ``target`` (default: the small steps)."""
    sanitizer = find_tool()
    if sanitizer is None:
        return Outcome(DID_NOT_RUN, "compute-sanitizer is not found")
    end = time.monotonic() + limit
    program, problem = build_seeded_bugs(folder, limit / 3)
    if program is None:
        return Outcome(DID_NOT_RUN, problem)
    start = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND)]
    seeded = run_command([*start, str(program), tool], limit / 3)
    if seeded.code != _FOUND:
        return Outcome(
            DID_NOT_RUN, f"did not find its seeded bug ({seeded.why}): {seeded.last_line}"
        )
    target = target or [sys.executable, str(ROOT / "python_tests" / "gpu_small_steps.py")]
    # Memory that PyTorch keeps and hands out again would hide what the tools look for.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    done = run_command([*start, *target], end - time.monotonic(), environment)
    if done.code is None:
        return Outcome(TIMED_OUT, f"found its seeded bug; {done.why}")
    return judge(done.code, done.text)
