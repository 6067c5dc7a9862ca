# SPDX-License-Identifier: Apache-2.0
"""A small make: runs compiler commands in parallel, and only those whose output is out of date."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from toolchain import BuildError

ROOT = Path(__file__).resolve().parent.parent  # commands run here; source paths are relative to it

# What `nvcc -Xptxas=-v` reports about each kernel. It belongs in the log, not on the terminal.
_RESOURCES = re.compile(r"ptxas info|\s+\d+ bytes stack frame|\s*$")


@dataclass
class Step:
    """One command and the file that it makes. The command's output is kept in ``log``.

    command: runs in ROOT. Paths below ROOT are relative, so that a moved checkout stays up to date.
    stamp: what else the result depends on, such as the compiler's version, as text.
    inputs: files that it reads, besides those that the compiler lists in ``output + '.d'``.
    """

    output: Path
    command: list[str]
    title: str
    stamp: str = ""
    inputs: list[Path] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.output.with_name(self.output.name + ".log")

    @property
    def _record(self) -> Path:
        return self.output.with_name(self.output.name + ".command")

    def _signature(self) -> str:
        text = "\n".join([*self.command, self.stamp])
        return hashlib.sha256(text.encode()).hexdigest()

    def _dependencies(self) -> list[Path]:
        listed = self.output.with_name(self.output.name + ".d")
        if not listed.is_file():
            return self.inputs
        # A makefile rule such as "a.o: x.cpp \\\n y.h"; names are escaped as in a shell.
        names = shlex.split(listed.read_text().replace("\\\n", " "))
        return [*self.inputs, *(ROOT / name for name in names if not name.endswith(":"))]

    def up_to_date(self) -> bool:
        if not self.output.is_file() or not self._record.is_file():
            return False
        if self._record.read_text() != self._signature():
            return False
        made = self.output.stat().st_mtime_ns
        return all(
            path.is_file() and path.stat().st_mtime_ns <= made for path in self._dependencies()
        )

    def run(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._record.unlink(missing_ok=True)  # an interrupted step is out of date
        print(f"[dualhead_ext] {self.title}", flush=True)
        done = subprocess.run(
            self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log.write_text(done.stdout)
        shown = [line for line in done.stdout.splitlines() if not _RESOURCES.match(line)]
        if shown:
            print("\n".join(shown), file=sys.stderr, flush=True)
        if done.returncode != 0:
            raise BuildError(
                f"{Path(self.command[0]).name} could not {self.title} (its messages are above)."
            )
        self._record.write_text(self._signature())


def job_count() -> int:
    """MAX_JOBS, as for torch's own extensions, else the processors this process may use."""
    text = os.environ.get("MAX_JOBS", "")
    return max(1, int(text)) if text.isdigit() else len(os.sched_getaffinity(0))


def run_steps(steps: list[Step]) -> None:
    """Run all steps that are out of date. After a failure, no further step is started."""
    pending = [step for step in steps if not step.up_to_date()]
    with ThreadPoolExecutor(job_count()) as pool:
        futures = [pool.submit(step.run) for step in pending]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Keep other builds of this checkout out: two at once would read half-written objects."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
