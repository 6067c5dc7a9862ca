# SPDX-License-Identifier: Apache-2.0
"""Commands with a time limit, and workers: processes that go through a list of cases.

A worker (:mod:`tools.gpu.worker`) reports on standard output when a case starts and ends. If a case
crashes or exceeds its limit, its process is killed, the case fails, and a new process runs the
remaining cases, because after a CUDA error nothing in the same process works any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import DID_NOT_RUN, FAILED, TIMED_OUT, tail

ROOT = Path(__file__).resolve().parents[2]
MARK = "@@ "  # prefix of a worker's lines that are records
SECONDS_PER_CASE = "DUALHEAD_SECONDS_PER_CASE"  # environment variable with a worker's limit

_running: set[subprocess.Popen] = set()
_running_lock = threading.Lock()


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **(more or {})}


def start(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command in the checkout, in its own process group, with all output in one pipe."""
    process = subprocess.Popen(
        list(command),
        cwd=ROOT,
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with _running_lock:
        _running.add(process)
    return process


def end(process: subprocess.Popen) -> None:
    """Kill a command and every process that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)  # a process that hangs in the driver is abandoned
    with _running_lock:
        _running.discard(process)


def end_all() -> None:
    """Kill every command that is still running."""
    with _running_lock:
        running = list(_running)
    for process in running:
        end(process)


class _Output:
    """The output lines of a process; a thread reads them, so that waiting has a time limit."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=[process.stdout], daemon=True).start()

    def _read(self, stream: Any) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                self._lines.put(line.decode(errors="replace"))
        self._lines.put(None)

    def next(self, end_time: float) -> str | None:
        """The next line, or None at the end of the output. Raises queue.Empty at ``end_time``."""
        return self._lines.get(timeout=max(end_time - time.monotonic(), 0.001))


@dataclass(frozen=True)
class Done:
    """A finished command. code: exit code, None if its time ran out. text: stdout and stderr."""

    code: int | None
    text: str

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return ([line for line in self.text.splitlines() if line.strip()] or [""])[-1]

    @property
    def why(self) -> str:
        """How it ended."""
        return "its time ran out" if self.code is None else f"exit code {self.code}"


def run_command(
    command: Sequence[str],
    limit: float,
    environment: dict[str, str] | None = None,
    seen: Callable[[str], None] = lambda line: None,
) -> Done:
    """Run a command in the checkout for at most ``limit`` seconds, then kill it and its children.

    Args:
        seen: called with each line of output.
    """
    end_time = time.monotonic() + limit
    try:
        process = start(command, environment)
    except OSError as error:
        return Done(127, f"{command[0]} cannot be started: {error}")
    output, lines = _Output(process), []
    try:
        while (line := output.next(end_time)) is not None:
            lines.append(line)
            seen(line)
        code = process.wait(max(end_time - time.monotonic(), 1))
    except (queue.Empty, subprocess.TimeoutExpired):
        code = None
    finally:
        end(process)
    return Done(code, "".join(lines))


@dataclass(frozen=True)
class Limits:
    """Time limits of a worker in seconds.

    Attributes:
        start: from the worker's start, or from the end of a case, to the start of the next case.
        case: of one case.
        end_time: time at which everything must have ended (time.monotonic()).
    """

    start: float
    case: float
    end_time: float


def go_through(
    command: Callable[[list[str]], list[str]],
    cases: Sequence[str],
    limits: Limits,
    record: Callable[[dict[str, Any]], None],
    log: Callable[[str], None] = lambda text: None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run all cases in workers.

    Args:
        command: function from cases to the command of a worker that runs them.
        record: called with one dict with "case", "outcome", "seconds" per case, and with each row
            that a case emits before its end, which has "case" but no "outcome".
        log: called with all other output of the workers.
    """
    left = list(cases)
    while left:
        if time.monotonic() + 1 > limits.end_time:
            for case in left:
                record({"case": case, "outcome": DID_NOT_RUN, "detail": "no time was left"})
            return
        worker = _Worker(command(left), limits, record, environment)
        finished = worker.run()
        log(worker.text())
        rest = [case for case in left if case not in finished]
        if not finished and rest:  # it died or hung before its first case
            record({"case": rest[0], "outcome": FAILED, "detail": worker.why_nothing})
            rest = rest[1:]
        left = rest


class _Worker:
    """One process of :func:`go_through`."""

    def __init__(
        self,
        command: list[str],
        limits: Limits,
        record: Callable[[dict[str, Any]], None],
        environment: dict[str, str] | None,
    ) -> None:
        self._limits, self._record, self._lines = limits, record, []
        self._command = command
        self._environment = {**(environment or {}), SECONDS_PER_CASE: str(limits.case)}
        self._case: str | None = None
        self._phase, self._since = "", time.monotonic()
        self.finished: set[str] = set()
        self.why_nothing = ""

    def text(self) -> str:
        """The worker's output other than records."""
        return "".join(self._lines)

    def run(self) -> set[str]:
        """Run until the worker ends or reaches a limit; returns the cases that have an outcome."""
        try:
            process = start(self._command, self._environment)
        except OSError as error:
            self.why_nothing = f"{self._command[0]} cannot be started: {error}"
            return self.finished
        output = _Output(process)
        try:
            while (line := output.next(self._end_time())) is not None:
                if line.startswith(MARK):
                    self._take(json.loads(line[len(MARK) :]))
                elif line.strip():
                    self._lines.append(line)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            self._stop(FAILED, f"the process ended, exit code {process.poll()}")
        except queue.Empty:
            self._stop(TIMED_OUT, "its time ran out")
        finally:
            end(process)
        return self.finished

    def _end_time(self) -> float:
        limit = self._limits.start if self._case is None else self._limits.case
        return min(self._since + limit, self._limits.end_time)

    def _take(self, said: dict[str, Any]) -> None:
        now = time.monotonic()
        if "start" in said:
            self._case, self._since, self._phase = said["start"], now, ""
        elif "end" in said:
            self._finish(said.pop("end"), said)
        elif "phase" in said:
            self._phase = said["phase"]
        elif "row" in said:
            self._record({"case": self._case, **said["row"]})

    def _finish(self, case: str, said: dict[str, Any]) -> None:
        now = time.monotonic()
        self._record({"case": case, "seconds": round(now - self._since, 2), **said})
        self.finished.add(case)
        self._case, self._since = None, now

    def _stop(self, outcome: str, why: str) -> None:
        phase = f" in phase {self._phase}" if self._phase else ""
        detail = f"{why}{phase}: {tail(self.text())}"
        self.why_nothing = f"before the first case: {detail}"
        if self._case is not None:
            self._finish(self._case, {"outcome": outcome, "detail": detail})
