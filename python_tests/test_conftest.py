# SPDX-License-Identifier: Apache-2.0
"""The rules of the test suite itself: which folder runs, GPU tests that cannot run, seeds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NO_GPU = "import torch\ntorch.cuda.is_available = lambda: False\n"
TESTS = """
import random
import pytest

@pytest.mark.cuda
def test_on_gpu():
    raise AssertionError("not reached without a GPU")

def test_numbers(seed):
    print("drawn", random.random(), "seed", seed)

@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("x", range(5))
def test_cases(x):
    pass
"""
BENCHMARK = """
def test_speed(pytestconfig):
    print("to", pytestconfig.option.results_json)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with our pytest configuration, one GPU test, one other test and one benchmark."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "conftest.py", "python_tests/conftest.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "no_gpu.py").write_text(NO_GPU)
    (folder / "python_tests" / "test_one.py").write_text(TESTS)
    (folder / "python_tests" / "test_cpu.py").write_text("def test_cpu():\n    pass\n")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "bench_one.py").write_text(BENCHMARK)
    return folder


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, (project, ROOT, ROOT / "python_tests")))
    command = [sys.executable, "-m", "pytest", "-p", "no_gpu", "-p", "no:cacheprovider", "-v", "-s"]
    return subprocess.run(
        [*command, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def drawn(done: subprocess.CompletedProcess) -> str:
    return next(line for line in done.stdout.splitlines() if "drawn" in line)


@pytest.fixture(scope="module")
def default(project) -> subprocess.CompletedProcess:
    return run(project)


@pytest.fixture(scope="module")
def required(project) -> subprocess.CompletedProcess:
    return run(project, "--require-cuda", "--seed", "1")


def test_gpu_tests_are_skipped_with_a_reason_and_benchmarks_left_out(default):
    assert default.returncode == 0, default.stdout + default.stderr
    assert "7 passed, 1 skipped" in default.stdout
    assert "needs a CUDA device" in default.stdout
    assert "bench_one" not in default.stdout
    assert "CUDA devices: none" in default.stdout


@pytest.mark.slow
def test_required_gpu_tests_fail_where_they_would_be_skipped(required):
    assert required.returncode == 1
    assert "7 passed, 1 error" in required.stdout
    sentence = "skipped although --require-cuda was given: Skipped: needs a CUDA device"
    assert sentence in required.stdout


@pytest.mark.slow
def test_seeds_decide_the_numbers_whatever_ran_before(project, default, required):
    assert "seed: 0" in default.stdout and "seed: 1" in required.stdout
    assert drawn(default) == drawn(run(project, "python_tests/test_one.py::test_numbers"))
    assert drawn(default) != drawn(required)


def test_requiring_cuda_of_no_gpu_test_is_an_error(project):
    done = run(project, "--require-cuda", "python_tests/test_cpu.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no test marked cuda was collected" in done.stderr


def test_of_many_cases_the_chosen_ones_are_quick(project):
    chosen = [run(project, "-m", word, "python_tests/test_one.py") for word in ("not slow", "slow")]
    quick, slow = (
        {line for line in done.stdout.splitlines() if "test_cases[" in line} for done in chosen
    )
    assert len(quick) == 2 and len(slow) == 3, chosen


@pytest.mark.slow
def test_the_benchmark_flag_runs_benchmarks_only(project):
    done = run(project, "--benchmark", "--results-json", "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_one.py::test_speed" in done.stdout
    assert "1 passed" in done.stdout and "test_one" not in done.stdout
    assert "to results.json" in done.stdout


def test_make_passes_files_of_results_in_one_word():
    """pytest takes the second of two words for a path, and reads the conftest.py beside it."""
    makefile = (ROOT / "Makefile").read_text()
    assert "--results-json=benchmarks/" in makefile and "--results-json " not in makefile
