# SPDX-License-Identifier: Apache-2.0
"""How the check uses Nsight Compute and compute-sanitizer, with programs that stand in for them.

The tests cover what their output means. A tool that misses a seeded bug is not trusted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest

from tools.gpu import counters, sanitizers
from tools.gpu.processes import ROOT
from tools.gpu.records import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT, read_lines
from tools.gpu.sanitizers import Outcome
from tools.gpu.stages import Output

# --- counters -------------------------------------------------------------------------------------

FAKE_NCU = """#!{python}
import sys
words = sys.argv[1:]
if "-o" in words:
    assert words[words.index("--clock-control") + 1] == "none", words
    if "int4-1" in words and {refuses}:
        print("==ERROR== no permission")
        sys.exit(1)
    open(words[words.index("-o") + 1] + ".ncu-rep", "w").close()
print("page", words[-1], "x" * 4000000)
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_counters_of_each_case(tmp_path, monkeypatch, refuses):
    tool = tmp_path / "ncu"
    tool.write_text(FAKE_NCU.format(python=sys.executable, refuses=refuses))
    tool.chmod(0o755)
    monkeypatch.setattr(counters.shutil, "which", lambda name: str(tool))
    word, detail = counters.run(Output(tmp_path / "out", "x"), time.monotonic() + 60)
    assert (word, "no permission" in detail) == ((FAILED, True) if refuses else (PASSED, False))
    size = (tmp_path / "out" / "ncu.txt").stat().st_size
    assert 2e6 < size < 16 * 2**20


# --- compute-sanitizer ----------------------------------------------------------------------------

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x90
=========     by thread (63,0,0) in block (0,0,0)
=========     Access at 0x7f0000000100 is out of bounds
=========
========= Program hit cudaErrorLaunchFailure (error 719) on CUDA API call to cudaDeviceSynchronize.
=========     Saved host backtrace up to driver entry point at error
========= ERROR SUMMARY: 2 errors
"""
OURS = "void dualhead::cuda::<unnamed>::decode_step_kernel<__nv_bfloat16>(DecodeParams, Workspace)"
THEIRS = "void at::native::vectorized_elementwise_kernel<4>(int)"
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at {kernel}+0x70
=========     and Read access at {kernel}+0xa0 [256 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_reports_are_told_apart():
    found = sanitizers.reports(MEMCHECK.format(kernel=OURS))
    assert [report.partition(" ")[0] for report in found] == ["Invalid", "Program"]
    assert "decode_step_kernel" in found[0]
    text = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors"
    assert sanitizers.reports(text) == []


@pytest.mark.parametrize(
    ("code", "text", "word"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", PASSED),
        (86, MEMCHECK.format(kernel=OURS), FAILED),
        # An API error counts, although it names no kernel
        (86, MEMCHECK.format(kernel=THEIRS), FAILED),
        (86, RACE.format(kernel=OURS), FAILED),
        (86, RACE.format(kernel=THEIRS), PASSED),
        (1, "Traceback\nImportError: no torch", FAILED),
        (86, "", FAILED),
        (None, RACE.format(kernel=OURS), FAILED),  # the error was found before the time limit
        (None, "fine: a\nfine: b\n", TIMED_OUT),
    ],
)
def test_what_a_run_means(code, text, word):
    found = sanitizers.judge(code, text)
    assert found.word == word
    assert code is not None or "2 steps" in found.detail or word == FAILED


FAKE_TOOL = """#!{python}
import sys
words = sys.argv[1:]
assert words[:1] == ["--tool"] and words[2:4] == ["--error-exitcode", "86"], words
if "--kernel-regex" in words and {refuses_filter}:
    print("unknown option")
    sys.exit(1)
print("========= COMPUTE-SANITIZER", *words)
seeded = words[-1] == words[1]
if seeded and {finds_seeded}:
    sys.exit(86)
if seeded:
    print({refusal!r})
    sys.exit({refusal_code})
sys.exit({target_code})
"""


def sanitize_with(
    tmp_path, monkeypatch, tool="racecheck", seen=lambda line: None, **how
) -> Outcome:
    defaults = {"finds_seeded": True, "refusal": "", "refusal_code": 0, "target_code": 0}
    settings = defaults | {"refuses_filter": False} | how
    path = tmp_path / "compute-sanitizer"
    path.write_text(FAKE_TOOL.format(python=sys.executable, **settings))
    path.chmod(0o755)
    monkeypatch.setattr(sanitizers, "find_tool", lambda: str(path))
    return sanitizers.sanitize(tool, tmp_path / "bugs", 60.0, seen)


def test_a_tool_is_believed_once_it_has_found_its_bug(tmp_path, monkeypatch):
    assert sanitize_with(tmp_path, monkeypatch).word == PASSED
    assert sanitize_with(tmp_path, monkeypatch, target_code=86).word == FAILED


@pytest.mark.parametrize(
    ("tool", "refuses", "filtered"),
    [("racecheck", False, True), ("racecheck", True, False), ("initcheck", False, False)],
)
def test_a_filter_of_kernels_is_used_where_the_seeded_bug_passes_it(
    tmp_path, monkeypatch, tool, refuses, filtered
):
    """initcheck needs no filter: it must see every kernel that writes."""
    lines = []
    how = {"tool": tool, "refuses_filter": refuses, "seen": lines.append}
    assert sanitize_with(tmp_path, monkeypatch, **how).word == PASSED
    assert ("--kernel-regex" in lines[-1]) == filtered
    assert f"{'with' if filtered else 'without'} a filter" in lines[0]


@pytest.mark.parametrize(("code", "why"), [(0, "exit code 0"), (255, "exit code 255")])
def test_a_tool_that_refuses_or_misses_did_not_run(tmp_path, monkeypatch, code, why):
    """It does not count as run, although it would have reported our kernels as correct."""
    refusal = "========= Error: Device not supported."
    how = {"finds_seeded": False, "refusal": refusal, "refusal_code": code}
    outcome = sanitize_with(tmp_path, monkeypatch, **how)
    assert outcome.word == DID_NOT_RUN
    assert why in outcome.detail and "Device not supported" in outcome.detail


def test_a_tool_that_is_not_there_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizers, "find_tool", lambda: None)
    expected = Outcome(DID_NOT_RUN, "compute-sanitizer is not found")
    assert sanitizers.sanitize("memcheck", tmp_path, 9.0) == expected


def test_all_tools_run_side_by_side(tmp_path, monkeypatch):
    found = {"memcheck": PASSED, "racecheck": FAILED, "initcheck": TIMED_OUT, "synccheck": PASSED}
    monkeypatch.setattr(sanitizers, "build_seeded_bugs", lambda *_: (tmp_path / "bugs", ""))
    monkeypatch.setattr(sanitizers, "sanitize", lambda tool, *_: Outcome(found[tool], "why"))
    word, detail = sanitizers.run(Output(tmp_path, "x"), time.monotonic() + 9)
    assert word == FAILED and "initcheck timed out" in detail
    rows = {row["name"]: row["outcome"] for row in read_lines(tmp_path / "stages.jsonl")}
    assert rows == found
    monkeypatch.setattr(sanitizers, "build_seeded_bugs", lambda *_: (None, "no nvcc"))
    assert sanitizers.run(Output(tmp_path, "x"), 0) == (DID_NOT_RUN, "no nvcc")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_seeded_bugs_compile(tmp_path):
    source = ROOT / "csrc" / "testing" / "seeded_bugs.cu"
    flags = ["-std=c++17", "-Werror=all-warnings", "-gencode=arch=compute_80,code=sm_80"]
    program = tmp_path / "bugs"
    done = subprocess.run(
        ["nvcc", *flags, "-o", str(program), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f'"{tool}"' in source.read_text() for tool in sanitizers.TOOLS)
    assert f"namespace {sanitizers.OURS}" in source.read_text(), "what the tools' filter is of"


def test_the_small_steps_run(monkeypatch, capsys):
    """On the CPU. The arguments that compute-sanitizer's target passes are accepted, and a wrong
    result is found.
    """
    import torch

    from tools.gpu import small_steps

    assert small_steps.steps_are_fine(small_steps.SIZES, torch.bfloat16, "cpu")
    assert small_steps.steps_are_fine(small_steps.PLAIN_SIZES, torch.bfloat16, "cpu")
    assert small_steps.steps_are_fine(small_steps.QUANTIZED_SIZES, torch.float32, "cpu", "int4")
    assert small_steps.losses_are_fine("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(sanitizers.STEP_IS_FINE) for line in lines) and len(lines) > 20
    monkeypatch.setitem(small_steps.OPTION_SETS, "wrong", {"beta_r": 1e38, "lambda_r": 1e38})
    assert not small_steps.losses_are_fine("cpu")
