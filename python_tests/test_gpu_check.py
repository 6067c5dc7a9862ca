# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` without a GPU: its steps, its limits, what it writes, and that a tool which
finds nothing is not believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_sanitize
import pytest
from gpu_steps import (
    DID_NOT_RUN,
    FAILED,
    PASSED,
    ROOT,
    TIMED_OUT,
    Outcome,
    Step,
    Steps,
    Suite,
    of_command,
    run_command,
    split,
)


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def step(name: str, source: str, limit: float = 60.0) -> Step:
    return Step(name, limit, of_command(python(source)))


def test_without_a_gpu_it_says_so_and_exits_with_3():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "python_tests/gpu_check.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("gpu-check: no GPU to check: torch ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def results_in(folder: Path) -> gpu_check.Results:
    environment = {"device": "Made Up 9000", "driver": "1.2", "csrc_sha256": "0" * 64}
    return gpu_check.Results(folder / "made-up.json", environment, folder / "benchmark.json")


def test_each_step_has_its_outcome_whatever_the_others_do(tmp_path):
    results = results_in(tmp_path)
    seen = []

    def look(limit):
        seen.append([row["outcome"] for row in json.loads(results.path.read_text())["steps"]])
        return Outcome(PASSED, "looked")

    def broken(limit):
        raise OSError("no such thing")

    part = json.dumps({"cases": [{"contender": "dualhead"}], "device": "of the benchmark"})
    write = f"open({str(results.part)!r}, 'w').write({part!r})"
    later = [
        [step("fails", "print('why'); raise SystemExit(5)"), Step("breaks", 9.0, broken)],
        [step("hangs", "print('so far', flush=True); import time; time.sleep(60)", 3.0)],
        [Step("looks", 9.0, look)],
        [step("measures", write)],
    ]
    start = time.monotonic()
    built = {"isa": "avx512"}
    assert not gpu_check.check(results, step("build", "print('built')"), later, lambda: built)
    assert time.monotonic() - start < 30
    found = json.loads(results.path.read_text())
    rows = {row["name"]: row for row in found["steps"]}
    assert rows["build"]["outcome"] == PASSED and rows["build"]["detail"] == "built"
    assert rows["fails"]["outcome"] == FAILED and rows["fails"]["detail"] == "why"
    assert rows["breaks"]["detail"] == "OSError: no such thing"
    assert rows["hangs"]["outcome"] == TIMED_OUT and rows["hangs"]["detail"] == "so far"
    assert len(seen[0]) == 4, "the file had the outcomes so far"
    assert found["cases"] == [{"contender": "dualhead"}]
    assert found["device"] == "Made Up 9000" and found["isa"] == "avx512"


def test_all_steps_passed(tmp_path):
    results = results_in(tmp_path)
    assert gpu_check.check(results, step("build", ""), [[step("one", ""), step("two", "")]])


def test_nothing_runs_on_a_build_that_failed(tmp_path):
    results = results_in(tmp_path)
    later = [[step("tests", "")], [step("benchmark", "")]]
    assert not gpu_check.check(results, step("build", "raise SystemExit(1)"), later)
    rows = json.loads(results.path.read_text())["steps"]
    assert [row["outcome"] for row in rows] == [FAILED, DID_NOT_RUN, DID_NOT_RUN]
    assert rows[1]["detail"] == "the build failed"


def test_the_whole_has_a_limit_too():
    steps = Steps(1.0, lambda: None)
    assert steps.run(step("slow", "import time; time.sleep(60)"))[0].word == TIMED_OUT
    assert steps.run(step("next", ""))[0] == Outcome(DID_NOT_RUN, "no time was left")


def test_what_a_command_started_ends_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_command(python(source), 1.5).code is None
    time.sleep(4)
    assert not mark.exists()


def test_the_limits_fit_into_nine_minutes(tmp_path):
    steps = gpu_check.plan(results_in(tmp_path))
    names = [step.name for together in steps for step in together]
    assert names[:3] == ["GPU tests", "sampling statistics", "benchmark"]
    assert set(gpu_sanitize.TOOLS) < set(names) and any(name.startswith("tests ") for name in names)
    assert gpu_check.SECONDS < 540
    assert gpu_check.results_path("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


TESTS = """
import pytest

def test_one(): pass
def test_two(): raise AssertionError("no")
@pytest.mark.skip
def test_three(): pass
@pytest.fixture
def broken(): raise OSError
def test_four(broken): pass
"""


def test_counts_of_the_suite_are_summed(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    suite, steps = Suite(tmp_path), Steps(300, lambda: None)
    arguments = ["--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    outcomes = steps.run(*(suite.step(f"tests {i}/2", 100, arguments) for i in (1, 2)))
    assert [outcome.word for outcome in outcomes] == [FAILED, FAILED]
    assert suite.tests == {"tests": 8, "passed": 2, "failures": 2, "errors": 2, "skipped": 2}


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_every_test_file_is_in_one_shard(tmp_path, count):
    files = sorted((ROOT / "python_tests").glob("test_*.py"))
    parts = split(files, count)
    assert sorted(path for part in parts for path in part) == files
    assert len(parts) == len(Suite(tmp_path).shards(count, 9.0)) == min(count, len(files))


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
    found = gpu_sanitize.reports(MEMCHECK.format(kernel=OURS))
    assert [report.partition(" ")[0] for report in found] == ["Invalid", "Program"]
    assert "decode_step_kernel" in found[0]
    assert (
        gpu_sanitize.reports("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors") == []
    )


@pytest.mark.parametrize(
    ("code", "text", "word"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", PASSED),
        (86, MEMCHECK.format(kernel=OURS), FAILED),
        (86, MEMCHECK.format(kernel=THEIRS), FAILED),  # the API error has no kernel: it counts
        (86, RACE.format(kernel=OURS), FAILED),
        (86, RACE.format(kernel=THEIRS), PASSED),
        (1, "Traceback\nImportError: no torch", FAILED),
        (86, "", FAILED),
    ],
)
def test_what_a_run_means(code, text, word):
    assert gpu_sanitize.judge(code, text).word == word


FAKE_TOOL = """#!{python}
import os, sys
words = sys.argv[1:]
assert words[:1] == ["--tool"] and words[2:4] == ["--error-exitcode", "86"], words
print("========= COMPUTE-SANITIZER")
seeded = words[-1] == words[1]
if seeded and {finds_seeded}:
    sys.exit(86)
if seeded:
    print({refusal!r})
    sys.exit({refusal_code})
sys.exit({target_code})
"""


def sanitize_with(tmp_path, monkeypatch, **how) -> Outcome:
    settings = {"finds_seeded": True, "refusal": "", "refusal_code": 0, "target_code": 0} | how
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_TOOL.format(python=sys.executable, **settings))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_sanitize, "find_tool", lambda: str(tool))
    monkeypatch.setattr(gpu_sanitize, "build_seeded_bugs", lambda *_: (tmp_path / "bugs", ""))
    return gpu_sanitize.sanitize("racecheck", tmp_path, 30.0)


def test_a_tool_is_believed_once_it_has_found_its_bug(tmp_path, monkeypatch):
    assert sanitize_with(tmp_path, monkeypatch).word == PASSED
    assert sanitize_with(tmp_path, monkeypatch, target_code=86).word == FAILED


@pytest.mark.parametrize(("code", "why"), [(0, "exit code 0"), (255, "exit code 255")])
def test_a_tool_that_refuses_or_misses_did_not_run(tmp_path, monkeypatch, code, why):
    """Though it would have called our kernels clean."""
    refusal = "========= Error: Device not supported."
    outcome = sanitize_with(
        tmp_path, monkeypatch, finds_seeded=False, refusal=refusal, refusal_code=code
    )
    assert outcome.word == DID_NOT_RUN
    assert why in outcome.detail and "Device not supported" in outcome.detail


def test_a_tool_that_is_not_there_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sanitize, "find_tool", lambda: None)
    expected = Outcome(DID_NOT_RUN, "compute-sanitizer is not found")
    assert gpu_sanitize.sanitize("memcheck", tmp_path, 9.0) == expected


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_seeded_bugs_compile(tmp_path):
    source = ROOT / "csrc" / "testing" / "seeded_bugs.cu"
    flags = ["-std=c++17", "-Werror=all-warnings", "-gencode=arch=compute_80,code=sm_80"]
    program = tmp_path / "bugs"
    done = subprocess.run(
        ["nvcc", *flags, "-o", str(program), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f'"{tool}"' in source.read_text() for tool in gpu_sanitize.TOOLS)


def test_the_small_steps_run(monkeypatch):
    """On the CPU: the arguments that compute-sanitizer's target passes are accepted, and what is
    wrong is seen."""
    import gpu_small_steps
    import torch

    assert gpu_small_steps.steps_are_fine(torch.bfloat16, "cpu")
    assert gpu_small_steps.losses_are_fine("cpu")
    monkeypatch.setitem(gpu_small_steps.OPTION_SETS, "wrong", {"beta_r": 1e38, "lambda_r": 1e38})
    assert not gpu_small_steps.losses_are_fine("cpu")
