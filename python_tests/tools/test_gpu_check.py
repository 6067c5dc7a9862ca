# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` without a GPU: budgets are kept, and its stages run with the CPU's operator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools.gpu import check, counters, processes, results, stages
from tools.gpu.processes import ROOT, Limits, go_through
from tools.gpu.records import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT, Lines, read_lines
from tools.gpu.stages import FILES, Cases, Output, Stage, Stages


def quick(word=PASSED, seconds=0.0):
    def run(end_time):
        time.sleep(min(seconds, max(0.0, end_time - time.monotonic())))
        return word, "detail"

    return run


def test_each_stage_has_its_outcome_whatever_the_others_do(tmp_path):
    def broken(end_time):
        raise OSError("no such thing")

    run = Stages(Output(tmp_path, "gpu-test"), 30)
    run.run([Stage("a", 9, 1, quick()), Stage("b", 9, 1, broken), Stage("c", 9, 1, quick())])
    rows = read_lines(tmp_path / "stages.jsonl")
    assert [(r["name"], r["outcome"]) for r in rows] == [
        ("a", PASSED),
        ("b", FAILED),
        ("c", PASSED),
    ]
    assert rows[1]["detail"] == "OSError: no such thing" and not run.passed
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_budget_is_kept_and_later_stages_have_their_share(tmp_path):
    given = {}

    def stage(name, limit, least, takes):
        def run(end_time):
            given[name] = end_time - time.monotonic()
            time.sleep(min(takes, given[name]))
            return PASSED, ""

        return Stage(name, limit, least, run)

    start = time.monotonic()
    run = Stages(Output(tmp_path, "gpu-test"), 10)
    run.run([stage("greedy", 60, 1, 60), stage("b", 3, 2, 0), stage("c", 60, 3, 60)])
    assert time.monotonic() - start < 12
    assert given["greedy"] == pytest.approx(5, abs=0.5)  # 10 minus what is reserved
    assert given["b"] == pytest.approx(2, abs=0.5)
    assert given["c"] == pytest.approx(5, abs=0.8)
    assert "shortened from 60 s" in (tmp_path / "log.txt").read_text()
    run.run([stage("late", 5, 5, 0)])
    assert read_lines(tmp_path / "stages.jsonl")[-1]["outcome"] == DID_NOT_RUN


def test_outcomes_of_cases_make_that_of_a_stage(tmp_path):
    output = Output(tmp_path, "gpu-test")
    cases = Cases(output, "smoke", "smoke")
    assert cases.outcome() == (FAILED, "no cases")
    for word, expected in ((PASSED, PASSED), (DID_NOT_RUN, DID_NOT_RUN), (TIMED_OUT, TIMED_OUT)):
        cases({"case": word, "outcome": word})
        assert cases.outcome()[0] == expected
    cases({"case": "x", "outcome": FAILED, "detail": "y" * 9000})
    assert cases.outcome() == (FAILED, "1 passed, 1 did not run, 1 timed out, 1 failed")
    assert len((tmp_path / "smoke.jsonl").read_text()) < 4000


def test_an_earlier_runs_files_are_replaced(tmp_path):
    (tmp_path / "smoke.jsonl").write_text("old")
    (tmp_path / "other").write_text("kept")
    Output(tmp_path, "gpu-test").lines("smoke").add(new=1)
    assert read_lines(tmp_path / "smoke.jsonl") == [{"new": 1}]
    assert (tmp_path / "other").read_text() == "kept" and len(FILES) == 8


def test_lines_of_many_threads_stay_whole(tmp_path):
    lines = Lines(tmp_path / "x.jsonl")

    def write(number):
        for _ in range(200):
            lines.add(number=number, text="z" * 500)

    threads = [threading.Thread(target=write, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_lines(lines.path)) == 1600


def command_line(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu.check", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_says_so_and_exits_with_3(tmp_path):
    done = command_line("--output", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stderr.startswith("gpu-check: no GPU to check: torch ")
    assert done.stderr.count("\n") == 1 and done.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_on_the_cpu(tmp_path):
    """Small sizes with the CPU's operator.

    Stages that need a GPU's tools are reported as not run.
    """
    smoke = ["bf16-1", "int4-9", "attention-2", "loss"]
    done = command_line(
        *("--device", "cpu", "--no-build", "--output", tmp_path, "--commit", "c0ffee"),
        *("--seconds", 900, "--smoke", *smoke),
        *(
            "--tests",
            "python_tests/ops/test_skipping.py::test_refusals",
            "--only",
            "smoke",
            "timings",
            "tests",
        ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_lines(tmp_path / "smoke.jsonl")
    assert {row["case"] for row in rows} == set(smoke)
    assert all(row["outcome"] == PASSED for row in rows)
    timings = read_lines(tmp_path / "timings.jsonl")
    contenders = {row["contender"] for row in timings if "contender" in row}
    assert {"step", "copy", "one_gemm", "gate_given", "alpha_0", "sampled"} <= contenders
    tests = read_lines(tmp_path / "tests.jsonl")
    assert [row["passed"] for row in tests if "file" in row] == [len(tests) - 1]
    names = [row["name"] for row in read_lines(tmp_path / "stages.jsonl") if "name" in row]
    assert names == ["load", "smoke", "timings", "tests"]
    found = results.gather([tmp_path])
    assert found["commit"] == "c0ffee" and found["tests"] == {"passed": len(tests) - 1}
    assert len(found["smoke"]) == 4 and found["copy_gb_per_s"] >= 0


def checked(tmp_path, **options):
    return check.Check(Output(tmp_path, "gpu-test"), device="cpu", **options)


def test_a_failing_test_is_reported_with_its_message(tmp_path):
    """pytest reports it, from a file of its own, and the other tests run."""
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_some.py"
    path.write_text(
        "import os, pytest\n"
        "def test_one(): pass\n"
        "def test_two(): assert 1 == 2, 'they differ'\n"
        "def test_three(): os._exit(3)\n"
        "@pytest.mark.skip\n"
        "def test_four(): pass\n"
        "def test_five(): print('x')\n"
    )
    names = [f"{path}::test_{n}" for n in ("one", "two", "three", "four", "five")]
    records = []

    def command(names):
        base = ["-q", "-p", "no:cacheprovider", "-p", "tools.gpu.worker"]
        return [sys.executable, "-m", "pytest", *base, "-c", os.devnull, *names]

    # pytest names tests relative to its root, which here is the folder of the file.
    short = [name.removeprefix(f"{path.parent}/") for name in names]

    def from_short(left):
        whole = [f"{path.parent}/{name}" for name in left]
        return [*command(whole), "--rootdir", str(path.parent)]

    go_through(from_short, short, Limits(60, 30, time.monotonic() + 100), records.append)
    words = {record["case"].rpartition("_")[2]: record["outcome"] for record in records}
    assert words == {
        "one": PASSED,
        "two": FAILED,
        "three": FAILED,
        "four": "skipped",
        "five": PASSED,
    }
    two = next(record for record in records if record["case"].endswith("two"))
    assert "they differ" in two["detail"] and two["when"] == "call"


def test_the_stages_fit_into_their_budgets(tmp_path):
    for mode, seconds in check.SECONDS.items():
        planned = check.plan(checked(tmp_path, tests=["python_tests/csrc/test_cuda.py"]), mode)
        assert seconds < (480 if mode == "check" else 200)
        assert sum(stage.least for stage in planned) + 40 < seconds  # 40 s for loading
        assert all(stage.least <= stage.limit for stage in planned)
    names = [stage.name for stage in check.plan(checked(tmp_path), "check")]
    assert names == [
        *("smoke", "timings", "counters", "tests", "sampling", "benchmark", "sanitizers")
    ]
    assert [s.name for s in check.plan(checked(tmp_path), "recheck")] == [
        *("smoke", "timings", "compile", "model")
    ]


def test_it_builds_for_this_gpu_whatever_the_image_asks_for(tmp_path, monkeypatch):
    """With --no-build, it builds only if the library does not load."""
    asked = []

    def run(command, limit, environment=None, seen=None):
        asked.append((command[1], (environment or {}).get("TORCH_CUDA_ARCH_LIST")))
        said = {"missing": None, "problem": None, "arch": "9.0a", "import_seconds": 1.0}
        said["environment"] = {"device": "Made Up", "csrc_sha256": "0", "sources_sha256": "1"}
        return processes.Done(0, json.dumps(said))

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0")
    monkeypatch.setattr(check, "run_command", run)
    found = check.describe("cuda", 9)
    for build, problem, builds in ((False, None, 0), (False, "missing", 1), (True, None, 1)):
        asked.clear()
        made = check.Check(Output(tmp_path, "x"), build=build, found=found | {"problem": problem})
        word, detail = made.load(time.monotonic() + 60)
        assert word == PASSED and "OTHER SOURCES" in detail
        assert [arch for name, arch in asked if name == "setup.py"] == ["9.0a"] * builds


def test_nothing_runs_where_loading_failed(tmp_path, monkeypatch):
    said = {"missing": None, "problem": "the library is missing", "arch": "9.0a"}
    monkeypatch.setattr(check, "describe", lambda *_: said)
    monkeypatch.setattr(check, "run_command", lambda *_: processes.Done(1, "nvcc: no such file"))
    assert check.main(["--output", str(tmp_path), "--device", "cuda"]) == 1
    rows = read_lines(tmp_path / "stages.jsonl")
    assert rows[0]["outcome"] == FAILED and len(rows) == 8
    assert "the build failed (exit code 1): nvcc" in rows[0]["detail"]
    assert {row["outcome"] for row in rows[1:]} == {DID_NOT_RUN}


def test_the_tests_of_a_gpu_are_found():
    files = check._files_of_gpu_tests()
    folder = "python_tests/csrc"
    named = {f"{folder}/test_cuda.py", f"{folder}/test_cuda_loss.py", check.SAMPLING}
    assert named <= set(files)
    assert not any("conftest" in file for file in files)


def test_failed_tests_are_those_to_run_again(tmp_path):
    lines = Lines(tmp_path / "tests.jsonl")
    for word in (PASSED, FAILED, TIMED_OUT, "skipped"):
        lines.add(stage="tests", case=f"a.py::{word}", outcome=word)
    assert check.failed_tests(tmp_path) == ["a.py::failed", "a.py::timed out"]


def test_files_of_one_results_file_are_of_one_source(tmp_path):
    for name, sources in (("a", "1"), ("b", "1"), ("c", "2")):
        lines = Lines(tmp_path / f"{name}.jsonl")
        (tmp_path / name).mkdir()
        lines = Lines(tmp_path / name / "stages.jsonl")
        lines.add(environment={"device": "NVIDIA H200", "driver": "1", "csrc_sha256": sources})
    (tmp_path / "b" / "loss.json").write_text(
        json.dumps({"cases": [], "loss": [{"contender": "eager"}], "failures": ["slow"]})
    )
    found = results.gather([tmp_path / "a", tmp_path / "b"])
    assert found["loss"] == [{"contender": "eager"}] and found["failures"] == ["slow"]
    with pytest.raises(ValueError, match="of one GPU and one csrc"):
        results.gather([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match="no machine"):
        results.gather([tmp_path])
    results.main([str(tmp_path / "a"), "--to", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["device"] == "NVIDIA H200"
    assert (
        results.file_name("NVIDIA H100 80GB HBM3", "-models") == "nvidia-h100-80gb-hbm3-models.json"
    )


def test_stages_of_one_module_are_those_of_the_check():
    """If a stage were renamed, the plan would still name the old one."""
    from tools.gpu import smoke, timings

    assert set(counters.CASES) <= set(smoke.CASES)
    assert set(timings.FIVE) <= set(timings.CASES) and len(timings.FIVE) == 5
    assert stages.FILES == FILES and Path(ROOT / "tools" / "gpu" / "check.py").is_file()
