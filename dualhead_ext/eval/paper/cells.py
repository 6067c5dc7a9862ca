# SPDX-License-Identifier: Apache-2.0
"""Cells: the units of a run. Each is computed once, stored, and named by a hash of its inputs.

A folder holds ``cells/<step>-<key>.json`` for each cell (options, result, machine) and, for cells
that write files, ``files/<step>-<key>/``. An interrupted run loses only the cell it was computing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...measurement.machine import describe

# Part of every key: increase it when a step's result changes for the same options.
RECIPE = 1


@dataclass(frozen=True, eq=False)
class Cell:
    """One unit of computation.

    Attributes:
        step: a name from `steps.STEPS`.
        label: name for people; not part of the key.
        options: plain values; together with ``needs`` they determine the result.
        needs: role -> the cell whose result or files the step reads.
    """

    step: str
    label: str
    options: Mapping[str, Any]
    needs: Mapping[str, Cell] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """16 hex digits of the SHA-256 of the step, its options and the keys of what it needs."""
        needs = {role: cell.key for role, cell in self.needs.items()}
        text = json.dumps([RECIPE, self.step, self.options, needs], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Name of the cell's file and folder."""
        return f"{self.step}-{self.key}"


@dataclass(frozen=True)
class Step:
    """How the cells of one kind are computed.

    Attributes:
        compute: (cell, store, folder to write or None) -> result, plain values.
        writes: whether it makes files.
        reads: whether it reads the files of what it needs, or the results alone.
    """

    compute: Callable[[Cell, Store, Path | None], dict[str, Any]]
    writes: bool = False
    reads: bool = True


class Store:
    """Results and files of cells in a folder.

    Args:
        out: the folder.
        steps: how each kind of cell is computed.
        data: what steps take rows from.
    """

    def __init__(self, out: Path, steps: Mapping[str, Step], data: Any = None) -> None:
        self.out, self.steps, self.data = Path(out), steps, data

    def _path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's files, whether or not they exist."""
        return self.out / "files" / cell.name

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's JSON record; None if it was not computed.

        Raises:
            ValueError: the file is not JSON or belongs to another cell; remove it.
        """
        path = self._path(cell)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"suite: {path} must be JSON; remove it to compute it anew") from error
        if not isinstance(record, dict) or record.get("key") != cell.key:
            raise ValueError(f"suite: {path} must be of cell {cell.key}; remove it")
        return record

    def keep(self, record: Mapping[str, Any]) -> None:
        """Add a record from another folder, unless the cell already has one here.

        Raises:
            ValueError: it is not a record of a known step.
        """
        step, key = record.get("step"), str(record.get("key"))
        # Both are parts of a file's name.
        if step not in self.steps or not re.fullmatch("[0-9a-f]{16}", key):
            raise ValueError(f"suite: a record must name its step and key, got {step!r} and {key}")
        path = self.out / "cells" / f"{step}-{key}.json"
        if not path.is_file():
            self._write(path, record)

    def result(self, cell: Cell) -> dict[str, Any]:
        """The result of a computed cell.

        Raises:
            LookupError: it was not computed.
        """
        record = self.record(cell)
        if record is None:
            raise LookupError(f"suite: {cell.label} ({cell.name}) was not computed")
        return record["result"]

    def done(self, cell: Cell) -> bool:
        return self._path(cell).is_file()

    def usable(self, cell: Cell) -> bool:
        """Whether a cell that reads this one's files can be computed."""
        return self.done(cell) and (not self.steps[cell.step].writes or self.folder(cell).is_dir())

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell whose needs are computed, and store it: files first, then the record."""
        step, folder = self.steps[cell.step], None
        if step.writes:
            folder = self.folder(cell)
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
            folder.parent.mkdir(parents=True, exist_ok=True)
        started, busy = time.monotonic(), time.process_time()
        result = step.compute(cell, self, folder)
        record = {
            "step": cell.step,
            "key": cell.key,
            "label": cell.label,
            "options": cell.options,
            "needs": {role: need.name for role, need in cell.needs.items()},
            "weights": self._weights(cell),
            "result": result,
            "seconds": round(time.monotonic() - started, 2),
            "cpu_seconds": round(time.process_time() - busy, 2),  # of all threads
            "environment": describe("cuda" if _on_gpu() else "cpu"),
        }
        self._write(self._path(cell), record)
        return record

    def _weights(self, cell: Cell) -> dict[str, str]:
        """Role -> digest of each model that a cell read."""
        results = {role: self.record(need) for role, need in cell.needs.items()}
        digests = {r: record["result"].get("weights") for r, record in results.items() if record}
        return {role: digest for role, digest in digests.items() if digest}

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}.tmp")
        staging.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(staging, path)

    # --- room -------------------------------------------------------------------------------------

    def bytes_held(self) -> int:
        """Total size in bytes of all files below the folder."""
        return sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())

    def drop_files(self, cells: Iterable[Cell], wanted: Sequence[Cell], limit: int) -> list[Cell]:
        """Remove files until the folder holds at most ``limit`` bytes: first those that no cell
        still to be computed reads, then the largest. Removed files that are still needed are
        computed again.

        Raises:
            RuntimeError: the records alone exceed the limit.
        """
        needed = {need.name for cell in unfolded(wanted) for need in cell.needs.values()}
        held = [cell for cell in cells if self.steps[cell.step].writes and self.usable(cell)]
        held.sort(key=lambda cell: (cell.name in needed, -_size(self.folder(cell))))
        dropped = []
        while (total := self.bytes_held()) > limit:
            if not held:
                raise RuntimeError(
                    f"suite: {self.out} holds {total} bytes of records, more than {limit}"
                )
            dropped.append(held.pop(0))
            shutil.rmtree(self.folder(dropped[-1]))
        return dropped


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def unfolded(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and everything that they need, without duplicates, needs first."""
    found: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        if cell.name not in found:
            for need in cell.needs.values():
                visit(need)
            found[cell.name] = cell

    for cell in cells:
        visit(cell)
    return list(found.values())


def pending(cells: Iterable[Cell], store: Store) -> Iterator[Cell]:
    """The cells that must be computed for ``cells``, needs first: those without a record, and those
    whose missing files one of them reads.
    """
    queued: set[str] = set()

    def visit(cell: Cell, ready: Callable[[Cell], bool]) -> Iterator[Cell]:
        if cell.name in queued or ready(cell):
            return
        reads = store.steps[cell.step].reads
        for need in cell.needs.values():
            yield from visit(need, store.usable if reads else store.done)
        queued.add(cell.name)
        yield cell

    for cell in unfolded(cells):
        yield from visit(cell, store.done)


@dataclass
class Outcome:
    """Result of :func:`run`: cells computed, cells left, and whether time ran out."""

    computed: list[Cell] = field(default_factory=list)
    left: list[Cell] = field(default_factory=list)


def run(
    cells: Sequence[Cell],
    store: Store,
    seconds: float | None = None,
    announce: Callable[[int, int, Cell], None] = lambda number, count, cell: None,
) -> Outcome:
    """Compute the missing ones of ``cells``.

    Args:
        seconds: start no cell that would not finish within this time, judged by the longest cell
            of its step so far. The first cell without a record, and what it needs, is always
            computed: otherwise runs with too little time or disk space would never make progress.
        announce: called before each cell with its number, their count and the cell.
    """
    started, outcome = time.monotonic(), Outcome()
    queue, longest, more_than_before = list(pending(cells, store)), _longest(cells, store), False
    for number, cell in enumerate(queue):
        expected = longest.get(cell.step, 0.0)
        late = seconds is not None and time.monotonic() - started + expected > seconds
        if late and more_than_before:
            outcome.left = queue[number:]
            break
        announce(number, len(queue), cell)
        more_than_before |= not store.done(cell)
        record = store.compute(cell)
        longest[cell.step] = max(expected, record["seconds"])
        outcome.computed.append(cell)
    return outcome


def _longest(cells: Iterable[Cell], store: Store) -> dict[str, float]:
    """Seconds of the longest computed cell of each step."""
    found: dict[str, float] = {}
    for cell in unfolded(cells):
        if record := store.record(cell):
            found[cell.step] = max(found.get(cell.step, 0.0), record["seconds"])
    return found
