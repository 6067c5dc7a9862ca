# SPDX-License-Identifier: Apache-2.0
"""The processes of `make gpu-check`: time limits kill them, and results survive that."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tools.gpu.processes import ROOT, Limits, go_through, run_command
from tools.gpu.records import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT, read_lines
from tools.gpu.stages import FILES

# A worker without torch: each case is "sleep SECONDS", "die", "rows N", or anything else.
WORKER = """
import os, sys, time
from tools.gpu import worker

def run(case):
    word, _, number = case.partition(" ")
    print("output of", case)
    if word == "sleep":
        worker.phase("sleeping")
        time.sleep(float(number))
    elif word == "die":
        os._exit(7)
    elif word == "fail":
        raise ValueError("no good")
    elif word == "rows":
        for i in range(int(number)):
            worker.row(contender=f"c{i}", us_median=1.0, us_q1=1.0, us_q3=2.0)
    return {"figure": 1}

worker.go_through(sys.argv[1:], run)
"""


def fake_worker(cases):
    return [sys.executable, "-c", WORKER, *cases]


def through(cases, case=20.0, start=60.0, seconds=120.0):
    """Run workers over the cases; returns their records and the log."""
    records, log = [], []
    limits = Limits(start, case, time.monotonic() + seconds)
    go_through(fake_worker, cases, limits, records.append, log.append)
    return records, "".join(log)


def test_a_case_that_dies_hangs_or_fails_spoils_no_other():
    cases = ["rows 2", "die", "good", "sleep 60", "fail", "last"]
    records, log = through(cases, case=3.0)
    ended = {r["case"]: r for r in records if "outcome" in r}
    assert list(ended) == cases
    words = [ended[case]["outcome"] for case in cases]
    assert words == [PASSED, FAILED, PASSED, TIMED_OUT, FAILED, PASSED]
    assert "exit code 7" in ended["die"]["detail"]
    assert "in phase sleeping" in ended["sleep 60"]["detail"]
    assert "line 10 in run" in ended["sleep 60"]["detail"], "where it hung"
    assert ended["fail"]["detail"] == "ValueError: no good" and ended["good"]["figure"] == 1
    rows = [r["contender"] for r in records if "outcome" not in r]
    assert rows == ["c0", "c1"] and "output of last" in log


def test_rows_of_a_case_are_kept_though_it_dies():
    records, _ = through(["rows 1", "die"])
    assert [r["case"] for r in records] == ["rows 1", "rows 1", "die"]


def test_workers_that_never_start_end(monkeypatch):
    def command(cases):
        return [sys.executable, "-c", "import sys; sys.exit('no torch')"]

    records = []
    go_through(command, ["a", "b"], Limits(30, 9, time.monotonic() + 60), records.append)
    assert [(r["case"], r["outcome"]) for r in records] == [("a", FAILED), ("b", FAILED)]
    assert "no torch" in records[0]["detail"]
    records.clear()
    go_through(
        lambda cases: ["/no/such/program"],
        ["a"],
        Limits(9, 9, time.monotonic() + 9),
        records.append,
    )
    assert "cannot be started" in records[0]["detail"]


def test_a_start_that_hangs_is_killed():
    records = []
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = time.monotonic()
    go_through(lambda cases: command, ["a"], Limits(2, 50, start + 50), records.append)
    assert time.monotonic() - start < 15
    assert records[0]["outcome"] == FAILED and "before the first case" in records[0]["detail"]


@pytest.mark.slow
def test_the_total_limit_ends_a_case_early():
    start = time.monotonic()
    records, _ = through(["sleep 60", "b", "c"], case=50, seconds=8)
    assert time.monotonic() - start < 20
    assert [r["outcome"] for r in records] == [TIMED_OUT, DID_NOT_RUN, DID_NOT_RUN]


@pytest.mark.slow
def test_what_a_command_started_ends_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(mark)!r}).touch()"
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert run_command([sys.executable, "-c", source], 1.5).code is None
    time.sleep(max(0.0, 8 - (time.monotonic() - start)))
    assert not mark.exists()


KILLED = f"""
import sys, time
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from tools.gpu.processes import Limits, go_through
from tools.gpu.stages import Cases, Output, Stage, Stages

WORKER = {WORKER!r}

def command(cases):
    return [sys.executable, "-S", "-c", WORKER, *cases]

def stage(file):
    def run(end_time):
        cases = Cases(output, file, file)
        limits = Limits(9, 9, end_time)
        with ThreadPoolExecutor(2) as pool:
            for part in range(2):
                names = [f"rows {{4 + part}}", f"sleep 0.0{{part}}", "die", "good"]
                pool.submit(go_through, command, names, limits, cases, output.log)
        return cases.outcome()
    return Stage(file, 9, 1, run)

output = Output(Path(sys.argv[1]), "gpu-test")
output.stages.add(environment={{"device": "Made Up 9000"}})
Stages(output, 60).run([stage(file) for file in ("smoke", "timings", "tests", "benchmark")])
"""


@pytest.mark.slow
def test_partial_results_survive_a_kill_at_any_moment(tmp_path):
    """The whole run takes a few seconds.

    It is killed 20 times, at moments spread over that time.
    """
    whole, start = tmp_path / "whole", time.monotonic()
    subprocess.run([sys.executable, "-c", KILLED, str(whole)], cwd=ROOT, capture_output=True)
    seconds = time.monotonic() - start
    complete = {name: len(read_lines(whole / name)) for name in FILES if name.endswith(".jsonl")}
    assert complete["stages.jsonl"] == 5 and complete["smoke.jsonl"] == 17
    chance, found = random.Random(0), []
    for number in range(20):
        folder = tmp_path / str(number)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(seconds * chance.uniform(0.1, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        counts = {name: len(read_lines(folder / name)) for name in complete}
        assert all(counts[name] <= complete[name] for name in counts)
        found.append(sum(counts.values()))
    assert len(set(found)) > 4, "the kills must hit different moments"


def test_an_interrupted_check_ends_what_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(5); pathlib.Path({str(mark)!r}).touch()"
    source = f"""
import signal, sys
from tools.gpu import check
from tools.gpu.processes import run_command
signal.signal(signal.SIGTERM, lambda *_: check._stop(143))
print("ready", flush=True)
run_command([sys.executable, "-c", {child!r}], 60)
"""
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(1)
    process.terminate()
    assert process.wait(10) == 143
    time.sleep(5)
    assert not mark.exists()
