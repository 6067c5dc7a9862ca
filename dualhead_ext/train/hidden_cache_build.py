# SPDX-License-Identifier: Apache-2.0
"""Building a :mod:`dualhead_ext.train.hidden_cache`: shards first, the index last, by all
processes.

Nothing is taken for a cache until its index is there, and a build begins by removing the old one.
Each build names its files anew, so that whoever still reads the old ones never meets new ones.
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
from .state import agree_on

SHARD_BYTES = 256 * 2**20  # of the states that a process holds before it writes them
# At most: a shard's header and the index's entry for it; a row's number.
_SHARD_OVERHEAD, _ROW_OVERHEAD = 1024, 8

# What a killed write_durably leaves.
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
) -> HiddenCache:
    """The cache in a folder; where it is none of what is asked for, built first. Collective: each
    process computes its own batches, the main one writes the index when all have finished.

    Args:
        folder, identity, lengths: of :class:`HiddenCache`.
        batches: rows of the batches of this process; those in none come on top.
        states_of: rows of a batch -> for each the states (tokens of its texts, d).
        dtype: one of `STORAGE_DTYPES`. progress: show a bar.
    Raises:
        OSError: too little room on the disk (nothing has been written), or it failed on the way
            (what was written is removed).
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    folder, main = Path(folder), PartialState().is_main_process
    shares = _shares(gather_object([batches]), len(lengths))
    share = shares[PartialState().process_index]
    build = _Build(folder, identity, lengths, states_of, dtype)
    with contextlib.ExitStack() as held:
        with agree_on(f"preparing {folder}"):
            if main:
                build.prepare(share[0][0], held)
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
    """For each process its batches, and which of a batch's rows it stores: each row is stored once,
    from the first batch that has it. Rows in no batch (dropped from the first epoch) come last.
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
        self.token: str | None = None  # in the names of its files; None: nothing to build
        self.entries: list[dict[str, Any]] = []  # of the shards that this process has written
        self._rows: list[int] = []  # of the next shard, their states and the size of those
        self._pending: list[Tensor] = []
        self._bytes = 0
        self._process = 0
        self._computed: torch.dtype | None = None

    # --- before ---

    def prepare(self, first: list[int], held: contextlib.ExitStack) -> None:
        """Find out whether there is anything to do; if so check the room, take the lock (until
        ``held`` closes), announce the build and remove the old files.
        """
        if self._problem() is None:
            return
        states = self.states_of(first)[0]
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
        room += sum(path.stat().st_size for path in self._files())  # they make way
        if size > room:
            raise OSError(
                f"{self.folder}: the hidden states need {_shown(size)}, the disk has "
                f"{_shown(room)} left"
            )

    def _files(self) -> list[Path]:
        """The cache's own files, the index first; nothing else in the folder is ever touched."""
        if not self.folder.is_dir():
            return []
        names = [n for n in sorted(os.listdir(self.folder)) if _is_ours(_TEMPORARY.sub(r"\1", n))]
        return [self.folder / name for name in sorted(names, key=lambda n: n != INDEX_NAME)]

    def _remove(self, files: list[Path]) -> None:
        for path in files:
            path.unlink(missing_ok=True)
            if path.name == INDEX_NAME:
                _synchronise(self.folder)  # from now on, the rest is no cache

    # --- shards ---

    def write_shards(
        self, share: list[tuple[list[int], list[int]]], process: int, progress: bool
    ) -> None:
        """The states of this process's share: (rows of a batch, those of them to store)."""
        self._process = process
        share = [(batch, kept) for batch, kept in share if kept]
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
        self.entries.append(entry)  # before it is there, so that it is removed whatever happens
        write_durably(self.folder / name, data)
        self._rows, self._pending, self._bytes = [], [], 0

    def _stored(self, computed: torch.dtype) -> torch.dtype:
        return computed if self._wanted == AS_COMPUTED else getattr(torch, self._wanted)

    # --- after ---

    def write_index(self, entries: list[dict[str, Any]]) -> None:
        """What makes a cache of the shards of all processes."""
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
        """Remove what this process has written if the block raises."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._remove([self.folder / entry["name"] for entry in self.entries])
            raise


def _is_ours(name: str) -> bool:
    return name == INDEX_NAME or SHARD_NAME.fullmatch(name) is not None


def _synchronise(folder: Path) -> None:
    """See a folder's entries onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shown(size: float) -> str:
    """Bytes for people: 1.5 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g} {units[0]}"
