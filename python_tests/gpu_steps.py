# SPDX-License-Identifier: Apache-2.0
"""Steps of ``make gpu-check`` and ``make gpu-models``: commands with a time limit, each with an
outcome, whatever the others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, TIMED_OUT, DID_NOT_RUN = "passed", "failed", "timed out", "did not run"


@dataclass(frozen=True)
class Outcome:
    """What became of a step: one of the four words, and a line for a person."""

    word: str
    detail: str


@dataclass(frozen=True)
class Done:
    """A command that has ended. code: None if its time ran out. text: stdout and stderr."""

    code: int | None
    text: str

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        return self.last_line_whole[:300]

    @property
    def last_line_whole(self) -> str:
        """The same, however long."""
        return ([line for line in self.text.splitlines() if line.strip()] or [""])[-1]

    @property
    def why(self) -> str:
        """How it ended."""
        return "its time ran out" if self.code is None else f"exit code {self.code}"


def run_command(
    command: list[str], limit: float, environment: dict[str, str] | None = None
) -> Done:
    """Run a command of the checkout for at most ``limit`` seconds, then end it and what it
    started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=max(limit, 0.1))
        return Done(process.returncode, text)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        return Done(None, text)


@dataclass(frozen=True)
class Step:
    """Something to do.

    Attributes:
        name: in the results.
        limit: seconds.
        run: gets its limit; returns an outcome.
    """

    name: str
    limit: float
    run: Callable[[float], Outcome]


def of_command(command: list[str]) -> Callable[[float], Outcome]:
    """A step that is one command: passed if it exits with 0. Its output is printed."""

    def run(limit: float) -> Outcome:
        done = run_command(command, limit)
        print(done.text[-6000:], flush=True)
        if done.code is None:
            return Outcome(TIMED_OUT, done.last_line)
        return Outcome(PASSED if done.code == 0 else FAILED, done.last_line)

    return run


class Steps:
    """Runs steps until a deadline and keeps what became of each.

    Attributes:
        rows: name, outcome, seconds, detail of each; in the results file.
        target: what make calls them, said before each line.
    """

    def __init__(
        self, seconds: float, changed: Callable[[], None], target: str = "gpu-check"
    ) -> None:
        self._end, self.target = time.monotonic() + seconds, target
        self._changed, self._lock = changed, threading.Lock()
        self.rows: list[dict[str, Any]] = []

    def run(self, *steps: Step) -> list[Outcome]:
        """Run these side by side; an exception in one is its failure."""
        with ThreadPoolExecutor(len(steps)) as pool:
            return list(pool.map(self._run, steps))

    def skip(self, names: list[str], why: str) -> None:
        """Note that these did not run."""
        for name in names:
            self._note(name, 0.0, Outcome(DID_NOT_RUN, why))

    def _run(self, step: Step) -> Outcome:
        start = time.monotonic()
        limit = min(step.limit, self._end - start)
        if limit <= 0:
            outcome = Outcome(DID_NOT_RUN, "no time was left")
        else:
            print(f"{self.target}: {step.name} ...", flush=True)
            try:
                outcome = step.run(limit)
            except Exception as error:  # whatever it is, the other steps go on
                outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        self._note(step.name, time.monotonic() - start, outcome)
        return outcome

    def _note(self, name: str, seconds: float, outcome: Outcome) -> None:
        row = {"name": name, "outcome": outcome.word, "seconds": round(seconds, 1)}
        with self._lock:
            self.rows.append({**row, "detail": outcome.detail})
            print(f"{self.target}: {name}: {outcome.word}. {outcome.detail}", flush=True)
            self._changed()

    @property
    def passed(self) -> bool:
        """Whether every step did."""
        return bool(self.rows) and all(row["outcome"] == PASSED for row in self.rows)


def split(files: list[Path], count: int) -> list[list[Path]]:
    """``files`` in at most ``count`` parts of about the same size; none is empty."""
    by_size = sorted(files, key=lambda path: path.stat().st_size, reverse=True)
    return [part for part in (by_size[i::count] for i in range(count)) if part]


class Suite:
    """The test suite in shards, side by side, and the sum of their results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests = dict.fromkeys(("tests", "passed", "failures", "errors", "skipped"), 0)

    def shards(self, count: int, limit: float) -> list[Step]:
        """All that needs no GPU, in at most ``count`` processes."""
        parts = split(sorted((ROOT / "python_tests").glob("test_*.py")), count)
        return [
            self.step(f"tests {i}/{len(parts)}", limit, ["-m", "not cuda", *map(str, part)])
            for i, part in enumerate(parts, 1)
        ]

    def step(self, name: str, limit: float, arguments: list[str]) -> Step:
        """A step of pytest whose counts are added to ``tests``."""
        counted = self.folder / f"{name.replace(' ', '-').replace('/', '-')}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        run = of_command([*command, f"--junitxml={counted}", *arguments])

        def run_and_count(limit: float) -> Outcome:
            outcome = run(limit)
            self._count(counted)
            return outcome

        return Step(name, limit, run_and_count)

    def _count(self, path: Path) -> None:
        if not path.is_file():  # killed before it could write
            return
        for suite in xml.parse(path).getroot().iter("testsuite"):
            counts = {name: int(suite.get(name, 0)) for name in self.tests if name != "passed"}
            not_passed = counts["failures"] + counts["errors"] + counts["skipped"]
            for name, value in (*counts.items(), ("passed", counts["tests"] - not_passed)):
                self.tests[name] += value
