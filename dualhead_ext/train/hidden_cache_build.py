# SPDX-License-Identifier: Apache-2.0
"""Building a :mod:`dualhead_ext.train.hidden_cache`: all processes write shards, then the main one
writes the index.

A folder without an index is not a cache, and a build begins by removing the old index. Each build
gives its files new names, so a process that still reads an old cache never sees new files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..files.atomic import locked, write_durably
from .hidden_cache import (
    AS_COMPUTED,
    FORMAT,
    FORMAT_VERSION,
    INDEX_NAME,
    SHARD_NAME,
    HiddenCache,
    UnusableCacheError,
)
from .state import agree_on, in_step

SHARD_BYTES = 256 * 2**20  # a process writes a shard when its hidden states reach this size
# Upper bounds: a shard's header plus its entry in the index; a row's number.
_SHARD_OVERHEAD, _ROW_OVERHEAD = 1024, 8

# A temporary file that a killed write_durably leaves behind.
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")

logger = logging.getLogger(__name__)


def open_or_build(
    folder: str | os.PathLike,
    identity: dict[str, Any],
    lengths: list[tuple[int, ...]],
    batches: list[list[int]],
    states_of: Callable[[list[int]], list[Tensor]],
    dtype: str = AS_COMPUTED,
    progress: bool = True,
    together: bool = False,
) -> HiddenCache:
    """The cache in a folder; it is built first if necessary. Collective: each process computes its
    own batches, and the main one writes the index when all have finished.

    Args:
        folder, identity, lengths: see :class:`HiddenCache`.
        batches: rows of the batches of this process; rows in no batch are added at the end.
        states_of: maps the rows of a batch to the hidden states (tokens of all texts, d) of each.
        dtype: one of `STORAGE_DTYPES`. progress: show a bar.
        together: ``states_of`` needs all processes at once.
    Raises:
        OSError: too little room on the disk (nothing is written), or writing failed (written files
            are removed).
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    folder, main = Path(folder), PartialState().is_main_process
    shares = _shares(gather_object([batches]), len(lengths))
    share = [part for part in shares[PartialState().process_index] if part[1]]
    build = _Build(folder, identity, lengths, states_of, dtype)
    if together:
        build.example = states_of(share[0][0] if share else [0])[0]
        share = in_step(share, ([0], []), together)
    with contextlib.ExitStack() as held:
        with agree_on(f"preparing {folder}"):
            if main:
                build.prepare(shares[0][0][0], held)
        build.token = broadcast_object_list([build.token])[0]
        if build.token is not None:
            with build.or_remove():
                with agree_on(f"caching hidden states in {folder}"):
                    build.write_shards(share, PartialState().process_index, progress and main)
                entries = gather_object(build.entries)
                with agree_on(f"finishing {folder}"):
                    if main:
                        build.write_index(entries)
    with agree_on(f"opening {folder}"):
        return HiddenCache(folder, identity, lengths)


def _shares(batches: list[list[list[int]]], count: int) -> list[list[tuple[list[int], list[int]]]]:
    """For each process its batches and the rows of each batch that it stores. Each row is stored
    once, from the first batch that has it. Rows in no batch (dropped in the first epoch) come last.
    """
    left, shares = set(range(count)), []
    for own in batches:
        share = []
        for batch in own:
            kept = [row for row in dict.fromkeys(batch) if row in left]
            left.difference_update(kept)
            share.append((batch, kept))
        shares.append(share)
    rest, size = sorted(left), len(batches[0][0]) if batches[0] else 1
    for number, start in enumerate(range(0, len(rest), size)):
        batch = rest[start : start + size]
        shares[number % len(shares)].append((batch, batch))
    return shares


class _Build:
    """One build of one cache, on one process."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        lengths: list[tuple[int, ...]],
        states_of: Callable[[list[int]], list[Tensor]],
        dtype: str,
    ) -> None:
        self.folder, self.identity, self.lengths = folder, identity, lengths
        self.states_of, self._wanted = states_of, dtype
        self.token: str | None = None  # part of the file names; None: nothing to build
        self.entries: list[dict[str, Any]] = []  # index entries of this process's shards
        self._rows: list[int] = []  # rows of the next shard
        self._pending: list[Tensor] = []  # their hidden states
        self._bytes = 0  # the size of those
        self._process = 0
        self.example: Tensor | None = None  # states of a row, where one process cannot make them
        self._computed: torch.dtype | None = None

    # --- before ---

    def prepare(self, first: list[int], held: contextlib.ExitStack) -> None:
        """If the cache must be built: check the free room, take the lock (until ``held`` closes),
        announce the build and remove the old files.
        """
        if self._problem() is None:
            return
        states = self.states_of(first)[0] if self.example is None else self.example
        size = self._stored(states.dtype).itemsize * states.shape[1]
        size = size * sum(map(sum, self.lengths)) + _ROW_OVERHEAD * len(self.lengths)
        size += _SHARD_OVERHEAD * (2 + size // SHARD_BYTES)
        self._check_room(size)
        self.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(self.folder))
        problem = self._problem()  # another run may have built it meanwhile
        if problem is None:
            return
        why = f"rebuilt, because {problem}: " if self._files() else ""
        print(
            f"{self.folder}: {why}hidden states of {len(self.lengths)} rows, {_shown(size)} on "
            "disk",
            flush=True,
        )
        self._remove(self._files())
        self.token = secrets.token_hex(4)

    def _problem(self) -> str | None:
        try:
            HiddenCache(self.folder, self.identity, self.lengths)
        except UnusableCacheError as error:
            return str(error)
        return None

    def _check_room(self, size: int) -> None:
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.is_dir())
        room = shutil.disk_usage(existing).free
        room += sum(path.stat().st_size for path in self._files())  # these will be removed
        if size > room:
            raise OSError(
                f"{self.folder}: the hidden states need {_shown(size)}, the disk has "
                f"{_shown(room)} left"
            )

    def _files(self) -> list[Path]:
        """The cache's own files, the index first. Other files in the folder are never touched."""
        if not self.folder.is_dir():
            return []
        names = [n for n in sorted(os.listdir(self.folder)) if _is_ours(_TEMPORARY.sub(r"\1", n))]
        return [self.folder / name for name in sorted(names, key=lambda n: n != INDEX_NAME)]

    def _remove(self, files: list[Path]) -> None:
        for path in files:
            path.unlink(missing_ok=True)
            if path.name == INDEX_NAME:
                _synchronise(self.folder)  # from now on, the folder is not a cache

    # --- shards ---

    def write_shards(
        self, share: list[tuple[list[int], list[int]]], process: int, progress: bool
    ) -> None:
        """Compute and write this process's share: (rows of a batch, rows of it to store)."""
        self._process = process
        for batch, kept in tqdm(share, "caching hidden states", disable=not progress):
            states = dict(zip(batch, self.states_of(batch), strict=True))
            for row in kept:
                self._add(row, states[row])
        self._flush()

    def _add(self, row: int, states: Tensor) -> None:
        self._computed = states.dtype
        self._rows.append(row)
        self._pending.append(states.to("cpu", self._stored(states.dtype)))
        self._bytes += self._pending[-1].nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        number = len(self.entries)
        name = f"hidden-{self.token}-{self._process}-{number:05d}.safetensors"
        hidden = torch.cat(self._pending)
        data = save({"hidden": hidden, "rows": torch.tensor(self._rows)})
        entry = {
            "name": name,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "shape": list(hidden.shape),
            "computed_dtype": str(self._computed).removeprefix("torch."),
            "dtype": str(hidden.dtype).removeprefix("torch."),
        }
        self.entries.append(entry)  # before writing, so that a failed write is removed too
        write_durably(self.folder / name, data)
        self._rows, self._pending, self._bytes = [], [], 0

    def _stored(self, computed: torch.dtype) -> torch.dtype:
        return computed if self._wanted == AS_COMPUTED else getattr(torch, self._wanted)

    # --- after ---

    def write_index(self, entries: list[dict[str, Any]]) -> None:
        """Write the index of the shards of all processes, which completes the cache."""
        _synchronise(self.folder)
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "rows": len(self.lengths),
            "hidden_size": entries[0]["shape"][1],
            "shards": entries,
        }
        for name in ("dtype", "computed_dtype"):
            (index[name],) = {entry.pop(name) for entry in entries}
        write_durably(self.folder / INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n")
        _synchronise(self.folder)

    @contextlib.contextmanager
    def or_remove(self) -> Iterator[None]:
        """Remove the files of this process if the block raises."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._remove([self.folder / entry["name"] for entry in self.entries])
            raise


def _is_ours(name: str) -> bool:
    return name == INDEX_NAME or SHARD_NAME.fullmatch(name) is not None


def _synchronise(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shown(size: float) -> str:
    """A size in bytes as text: 1.5 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g} {units[0]}"
