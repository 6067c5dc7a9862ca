# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer on small decode steps and losses (:mod:`tools.gpu.small_steps`).

Each tool first runs on a program with a bug of its kind (csrc/testing/seeded_bugs.cu). A tool that
does not find the bug, because it rejects the device or is not installed, is reported as not run.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .processes import ROOT, run_command
from .records import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT
from .stages import Output

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit code that we set for "errors were found"
OURS = "dualhead"  # the namespace at the beginning of our kernels' names
STEP_IS_FINE = "fine: "  # prefix of the name of each step that small_steps has passed
_SUMMARY = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target")
# Only our kernels are checked, which takes a fraction of the time; the seeded bugs have the same
# namespace. initcheck must see all writes to memory, including those of PyTorch's kernels.
_FILTER = ["--kernel-regex", f"kernel_substring={OURS}"]


@dataclass(frozen=True)
class Outcome:
    """An outcome word of :mod:`.records`, and a line of detail."""

    word: str
    detail: str


def find_tool() -> str | None:
    """compute-sanitizer from PATH, or from nvcc's folder."""
    found = shutil.which("compute-sanitizer")
    nvcc = shutil.which("nvcc")
    if found is None and nvcc is not None:
        beside = Path(nvcc).resolve().parent / "compute-sanitizer"
        found = str(beside) if beside.is_file() else None
    return found


def build_seeded_bugs(folder: Path, limit: float) -> tuple[Path | None, str]:
    """(program, "") or (None, reason), built for this machine's GPU."""
    program = folder / "seeded_bugs"
    source = ROOT / "csrc" / "testing" / "seeded_bugs.cu"
    if shutil.which("nvcc") is None:
        return None, "nvcc is not found, which builds the seeded bugs"
    command = ["nvcc", "-std=c++17", "-arch=native", "-o", str(program), str(source)]
    done = run_command(command, limit)
    return (program, "") if done.code == 0 else (None, f"nvcc: {done.last_line.strip()}")


def reports(text: str) -> list[str]:
    """A tool's reports, one text each: an unindented line after ``=========`` and the indented
    lines that follow it."""
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
    """Whether a report counts: it names one of our kernels, or no kernel at all. Reports on kernels
    of PyTorch and cuBLAS do not count."""
    return OURS in report or not re.search(r"(?m)^at |\bat .+\+0x", report)


def judge(code: int | None, text: str) -> Outcome:
    """The outcome of a tool's run on our kernels; ``code`` is None if its time ran out."""
    found = reports(text)
    ours = [report for report in found if counts(report)]
    fine = [line for line in text.splitlines() if line.startswith(STEP_IS_FINE)]
    steps = f"{len(fine)} steps"
    if code == 0:
        return Outcome(PASSED, steps)
    if code == FOUND and not ours and found:
        return Outcome(PASSED, f"{steps}; {len(found)} reports in kernels that are not ours")
    if ours:
        first = ours[0].partition("\n")[0]
        return Outcome(FAILED, f"{len(ours)} reports, the first: {first}; {steps} had ended")
    if code is None:
        return Outcome(TIMED_OUT, f"nothing found in the {steps} that had ended")
    lines = text.strip().splitlines() or ["no output"]
    return Outcome(FAILED, f"exit code {code}: {lines[-1][:200]}; {steps} had ended")


def sanitize(
    tool: str,
    program: Path,
    limit: float,
    seen: Callable[[str], None] = lambda line: None,
    target: list[str] | None = None,
) -> Outcome:
    """Run one tool, first on its seeded bug in ``program``, then on ``target`` (default: the small
    steps)."""
    sanitizer = find_tool()
    if sanitizer is None:
        return Outcome(DID_NOT_RUN, "compute-sanitizer is not found")
    end = time.monotonic() + limit
    start = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
    filters = [] if tool == "initcheck" else _FILTER
    seeded = run_command([*start, *filters, str(program), tool], limit / 3)
    if seeded.code != FOUND and filters:  # perhaps this version has no such option
        filters = []
        seeded = run_command([*start, str(program), tool], (end - time.monotonic()) / 2)
    if seeded.code != FOUND:
        last = seeded.last_line.strip()
        return Outcome(DID_NOT_RUN, f"did not find its seeded bug ({seeded.why}): {last}")
    seen(f"{tool} found its seeded bug, {'with' if filters else 'without'} a filter of kernels\n")
    target = target or [sys.executable, "-m", "tools.gpu.small_steps"]
    # PyTorch's caching allocator would hide the errors that the tools look for.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = end - time.monotonic()
    done = run_command([*start, *filters, *target], left, environment, seen)
    return judge(done.code, done.text)


def run(output: Output, end_time: float) -> tuple[str, str]:
    """Run all tools in parallel and write ``sanitizers.txt``; returns outcome and detail."""
    with tempfile.TemporaryDirectory() as folder:
        program, problem = build_seeded_bugs(Path(folder), 40)
        if program is None:
            return DID_NOT_RUN, problem

        def one(tool: str) -> str:
            start = time.monotonic()

            def seen(line: str) -> None:
                output.text("sanitizers.txt", f"{tool}: {line}")

            found = sanitize(tool, program, end_time - start, seen)
            seconds = round(time.monotonic() - start, 1)
            output.stages.add(name=tool, outcome=found.word, seconds=seconds, detail=found.detail)
            output.say(f"{tool}: {found.word} in {seconds} s. {found.detail}")
            return found.word

        with ThreadPoolExecutor(len(TOOLS)) as pool:
            words = list(pool.map(one, TOOLS))
    worst = next((word for word in (FAILED, TIMED_OUT, DID_NOT_RUN) if word in words), PASSED)
    return worst, ", ".join(f"{tool} {word}" for tool, word in zip(TOOLS, words, strict=True))
