# SPDX-License-Identifier: Apache-2.0
"""Stages of the check: each has a time limit and an outcome, and writes its results at once,
independently of the others."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT, Lines, append, tail

FILES = ("stages.jsonl", "smoke.jsonl", "timings.jsonl", "tests.jsonl", "benchmark.jsonl")
FILES += ("ncu.txt", "sanitizers.txt", "log.txt")
_LONGEST_LOG = 100_000  # maximum characters of one log entry


@dataclass(frozen=True)
class Stage:
    """One stage of the check.

    Attributes:
        name: name in the results.
        limit: maximum duration in seconds.
        least: seconds that earlier stages must leave for it.
        run: function of the time (time.monotonic()) at which the stage must have ended.
    """

    name: str
    limit: float
    least: float
    run: Callable[[float], tuple[str, str]]


class Output:
    """The folder of results: files of JSON lines, text files, and a log of all output.

    Attributes:
        stages: name, outcome, seconds, detail of each stage, and the machine.
    """

    def __init__(self, folder: Path, target: str, start: float | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # left by an earlier run
            (folder / name).unlink(missing_ok=True)
        self.folder, self.target, self._lock = folder, target, threading.Lock()
        self._start = time.monotonic() if start is None else start
        self._files: dict[str, Lines] = {}
        self.stages = self.lines("stages")

    def lines(self, name: str) -> Lines:
        """The file of JSON lines with that name."""
        if name not in self._files:
            self._files[name] = Lines(self.folder / f"{name}.jsonl")
        return self._files[name]

    def text(self, name: str, text: str) -> None:
        """Append to a text file."""
        append(self.folder / name, text)

    def log(self, text: str) -> None:
        """Append to the log; only the end of a long text is kept."""
        text = text[-_LONGEST_LOG:]
        if text:
            self.text("log.txt", text if text.endswith("\n") else text + "\n")

    def say(self, text: str) -> None:
        """Write to the terminal and the log, with the seconds since the start."""
        line = f"[{time.monotonic() - self._start:5.1f}] {self.target}: {text}"
        with self._lock:  # one line at a time, from any thread
            print(line, flush=True)
            self.log(line)


class Stages:
    """Runs stages until a deadline.

    Attributes:
        words: outcomes of the stages so far.
    """

    def __init__(self, output: Output, seconds: float, start: float | None = None) -> None:
        self.output = output
        self.end_time = (time.monotonic() if start is None else start) + seconds
        self.words: list[str] = []

    def run(self, stages: Sequence[Stage]) -> None:
        """Run the stages in turn. A stage fails if it raises an exception."""
        for number, stage in enumerate(stages):
            left = self.end_time - time.monotonic()
            reserved = sum(later.least for later in stages[number + 1 :])
            self._run(stage, min(stage.limit, max(left - reserved, min(stage.least, left))))

    def _run(self, stage: Stage, limit: float) -> None:
        start = time.monotonic()
        if limit < 1:
            self.note(stage.name, DID_NOT_RUN, "no time was left", 0.0)
            return
        shortened = "" if limit >= stage.limit else f", shortened from {stage.limit:.0f} s"
        self.output.say(f"{stage.name}: at most {limit:.0f} s{shortened}")
        try:
            outcome, detail = stage.run(start + limit)
        except Exception as error:  # whatever it is, the other stages go on
            self.output.log(traceback.format_exc())
            outcome, detail = FAILED, f"{type(error).__name__}: {error}"
        self.note(stage.name, outcome, detail, time.monotonic() - start)

    def note(self, name: str, outcome: str, detail: str, seconds: float) -> None:
        """Record and print the outcome of a stage."""
        self.words.append(outcome)
        row = {"name": name, "outcome": outcome, "seconds": round(seconds, 1), "detail": detail}
        self.output.stages.add(**row)
        self.output.say(f"{name}: {outcome} in {seconds:.1f} s. {detail}")

    @property
    def passed(self) -> bool:
        """Whether every stage has passed."""
        return bool(self.words) and all(word == PASSED for word in self.words)


class Cases:
    """Stores and prints the records of a stage's cases.

    Attributes:
        ended: records of cases that have an outcome.
    """

    def __init__(self, output: Output, file: str, stage: str, quiet: bool = False) -> None:
        self._output, self._lines, self._stage = output, output.lines(file), stage
        self._quiet = quiet
        self.ended: list[dict[str, Any]] = []

    def __call__(self, record: dict[str, Any]) -> None:
        """Store a record of :func:`tools.gpu.processes.go_through`."""
        self._lines.add(stage=self._stage, **record)
        if "outcome" in record:
            self.ended.append(record)
            if not self._quiet or record["outcome"] not in (PASSED, "skipped"):
                self._output.say(f"{self._stage} {_in_words(record)}")
        elif "us_median" in record:
            rate = f", {record['gb_per_s']:.0f} GB/s" if "gb_per_s" in record else ""
            self._output.say(
                f"{self._stage} {record['case']} {record['contender']}: "
                f"{record['us_median']:.2f} us ({record['us_q1']:.2f}..{record['us_q3']:.2f}){rate}"
            )

    def outcome(self) -> tuple[str, str]:
        """The outcome of the stage, from the outcomes of its cases."""
        words = [record["outcome"] for record in self.ended]
        counts = {word: words.count(word) for word in dict.fromkeys(words)}
        detail = ", ".join(f"{count} {word}" for word, count in counts.items()) or "no cases"
        for word in (FAILED, TIMED_OUT, DID_NOT_RUN):
            if word in words:
                return word, detail
        return (PASSED if words else FAILED), detail


def _in_words(record: dict[str, Any]) -> str:
    """ "bf16-1: passed in 3.2 s (logits_error 3.1e-06)"."""
    detail = tail(str(record.get("detail", "")), 4)
    figures = [
        f"{name} {value:.2g}" for name, value in record.items() if name.endswith(("_error", "us"))
    ]
    shown = f" ({', '.join(figures)})" if figures else ""
    seconds = f" in {record['seconds']} s" if "seconds" in record else ""
    return f"{record['case']}: {record['outcome']}{seconds}{shown}{': ' * bool(detail)}{detail}"


def python(module: str, *arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, "-X", "faulthandler", "-m", module, *arguments]
