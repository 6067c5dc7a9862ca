# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders. A crash cannot leave one half written, and damage is detected.

A checkpoint is built in a hidden folder beside it. Every file is flushed to disk, a manifest with
each file's size and SHA-256 is written last, and one rename makes the checkpoint visible. Reading
begins with `verify`. Only regular files inside the folder are opened; nothing is unpickled.

    checkpoint-50/               complete: manifest.json and exactly the files that it lists
    .checkpoint-60.staging/      being written, or left by a crash; the next save removes it
    .checkpoint-40.deleting/     being removed, or left by a crash; the next save removes it
    .checkpoint-50.replaced/     the old checkpoint while a new one replaces it; put back or removed
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from .atomic import synchronise
from .foreign import brief

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "dualhead-checkpoint", 1
MANIFEST_NAME = "manifest.json"

_FOLDER = re.compile(r"checkpoint-(\d{1,18})")
_TEMPORARY = re.compile(r"\.(checkpoint-\d{1,18})\.(staging|replaced|deleting)")
_MAX_MANIFEST_BYTES = 4 * 2**20
_MAX_NAME_BYTES = 1024
_CHUNK_BYTES = 2**20


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, foreign or of a newer format. The message says which
    file, and why.
    """


class SaveError(OSError):
    """A save failed. The message says what, why, and which checkpoint is intact."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended. The message names the checkpoint to resume from."""


# --- writing -------------------------------------------------------------------------------------


def begin(directory: str | os.PathLike, step: int) -> Path:
    """Remove leftovers of crashes, and return an empty staging folder for ``checkpoint-{step}``.

    Raises:
        ValueError: a negative step.
        OSError: the folder cannot be written.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"checkpoint.begin: step must be an int >= 0, got {step!r}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    clean(directory)
    staging = directory / f".checkpoint-{step}.staging"
    staging.mkdir()
    return staging


def commit(staging: Path, required: tuple[str, ...] = ()) -> Path:
    """Turn a filled staging folder into its checkpoint, atomically: a crash leaves the old state or
    the new one. Returns the checkpoint's path.

    Args:
        required: names of files that the checkpoint must have.
    Raises:
        CheckpointError: a required file is missing, or the folder holds something that is not a
            regular file.
        OSError: the disk.
    """
    match = cast(re.Match, _TEMPORARY.fullmatch(staging.name))  # `begin` gave it its name
    final, replaced = staging.parent / match[1], staging.parent / f".{match[1]}.replaced"
    files = {}
    for name, path in _files_below(staging):
        _check_name(staging / MANIFEST_NAME, name)
        files[name] = dict(zip(("size", "sha256"), _digest(path, synchronise=True), strict=True))
    if missing := [name for name in required if name not in files]:
        raise CheckpointError(
            f"{final}: cannot be finished: {', '.join(missing)} vanished while it was being written"
        )
    with open(staging / MANIFEST_NAME, "xb") as file:
        file.write(_manifest_bytes(files))
        file.flush()
        os.fsync(file.fileno())
    for folder, _, _ in os.walk(staging):
        synchronise(Path(folder))
    if os.path.lexists(final):
        os.rename(final, replaced)
    os.rename(staging, final)
    synchronise(staging.parent)
    if os.path.lexists(replaced):
        _remove(replaced)
    return final


def discard(staging: Path) -> None:
    """Remove a staging folder after a failure. The next save removes what cannot be removed now."""
    with contextlib.suppress(OSError):
        _remove(staging)


@contextlib.contextmanager
def staged(
    directory: str | os.PathLike, step: int, required: tuple[str, ...] = ()
) -> Iterator[Path]:
    """``with staged(directory, step) as folder``: write files, including the ``required`` ones,
    into the folder. At the end it becomes ``checkpoint-{step}``; if the block raises, it is
    removed.
    """
    staging = begin(directory, step)
    try:
        yield staging
        commit(staging, required)
    except BaseException:
        discard(staging)
        raise


def clean(directory: str | os.PathLike) -> None:
    """Finish what a crash interrupted: restore a replaced checkpoint if its replacement is missing,
    and remove other temporary folders.
    """
    for entry in sorted(os.scandir(os.fspath(directory)), key=lambda e: e.name):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        final = Path(directory) / match[1]
        if match[2] == "replaced" and not os.path.lexists(final):
            os.rename(entry.path, final)
            synchronise(Path(directory))
        else:
            _remove(Path(entry.path))


def rotate(
    directory: str | os.PathLike, limit: int, keep: tuple[str | os.PathLike, ...] = ()
) -> None:
    """Remove the oldest checkpoints until ``limit`` are left, except those in ``keep`` and the
    newest one, which is fully verified first. Folders that are not complete checkpoints are neither
    counted nor removed.

    Raises:
        ValueError: limit is not an int of at least 1.
        CheckpointError: the newest checkpoint is damaged. Nothing is removed.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"checkpoint.rotate: limit must be an int >= 1, got {limit!r}")
    whole = []
    for path in _numbered(directory):
        try:
            verify(path, contents=False)
        except CheckpointError as error:
            logger.warning("Not counted as a checkpoint: %s", error)
        else:
            whole.append(path)
    excess = len(whole) - limit
    if excess <= 0:
        return
    verify(whole[-1])
    kept = {os.path.realpath(path) for path in keep} | {os.path.realpath(whole[-1])}
    for path in [p for p in whole if os.path.realpath(p) not in kept][:excess]:
        deleting = path.with_name(f".{path.name}.deleting")
        os.rename(path, deleting)
        synchronise(path.parent)
        _remove(deleting)


# --- reading -------------------------------------------------------------------------------------


def latest_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The highest-numbered complete checkpoint, fully verified; None if there is none. A warning
    names each one that is skipped, and why.
    """
    if not os.path.isdir(directory):
        return None
    for entry in sorted(os.listdir(directory)):  # a crash between two renames
        match = _TEMPORARY.fullmatch(entry)
        if match and match[2] == "replaced" and not os.path.lexists(Path(directory) / match[1]):
            os.rename(Path(directory) / entry, Path(directory) / match[1])
    for path in reversed(_numbered(directory)):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("Passing over %s: %s", path.name, error)
        else:
            return path
    return None


def verify(path: str | os.PathLike, contents: bool = True) -> list[str]:
    """Check a checkpoint against its manifest. Returns the names of its files.

    Args:
        contents: whether to check the hash of every file, not only names and sizes.
    Raises:
        CheckpointError: not a folder; the manifest is missing, damaged, of another format or a
            newer version; a file is missing, truncated, changed, not listed, not a regular file, or
            outside the folder.
    """
    try:
        return _verify(Path(path), contents)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _verify(path: Path, contents: bool) -> list[str]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a folder")
    files = _read_manifest(path)
    present = dict(_files_below(path))
    present.pop(MANIFEST_NAME)
    missing, foreign = sorted(set(files) - set(present)), sorted(set(present) - set(files))
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing")
    if foreign:
        raise CheckpointError(f"{path}: {foreign[0]} is not listed in {MANIFEST_NAME}")
    for name, expected in files.items():
        size = os.stat(present[name], follow_symlinks=False).st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path}: {name} must have {expected['size']} bytes, got {size}")
    if contents:
        for name, expected in files.items():
            if _digest(present[name])[1] != expected["sha256"]:
                raise CheckpointError(f"{path}: {name} has changed: its SHA-256 does not match")
    return sorted(files)


def _numbered(directory: str | os.PathLike) -> list[Path]:
    """Folders named checkpoint-N, sorted by N; symbolic links are not followed."""
    found = []
    for entry in os.scandir(os.fspath(directory)):
        match = _FOLDER.fullmatch(entry.name)
        if match and entry.is_dir(follow_symlinks=False):
            found.append((int(match[1]), Path(entry.path)))
    return [path for _, path in sorted(found)]


# --- the manifest --------------------------------------------------------------------------------


def _manifest_bytes(files: dict[str, dict[str, Any]]) -> bytes:
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": files}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"manifest_sha256": own}, indent=1).encode() + b"\n"


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, name -> {size, sha256}, with all fields checked."""
    path = folder / MANIFEST_NAME
    try:
        with _open_regular(path) as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: holds no {MANIFEST_NAME}: incomplete or foreign"
        ) from None
    if len(data) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: must have at most {_MAX_MANIFEST_BYTES} bytes")
    try:
        stored = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({brief(error)})") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a manifest of the format {FORMAT}")
    version = stored.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {brief(version)}, newer than {FORMAT_VERSION}, the newest "
            "that this release reads; update it"
        )
    files = stored.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: must list files")
    for name, entry in files.items():
        _check_name(path, name)
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or entry["size"] < 0:
            raise CheckpointError(f"{path}: {brief(repr(name))} has no valid size")
    # A manifest has exactly one spelling, so any changed byte, also in its hash, is detected here.
    if data != _manifest_bytes(files):
        raise CheckpointError(f"{path}: has changed: its own SHA-256 does not match")
    if any(set(entry) != {"size", "sha256"} for entry in files.values()):
        raise CheckpointError(f"{path}: must have only size and sha256 of each file")
    return files


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_name(manifest: Path, name: str) -> None:
    """Raise CheckpointError unless ``name`` is a normalised relative path inside the folder."""
    parts = name.split("/")
    bad = any(part in ("", ".", "..") for part in parts)
    bad = bad or "\\" in name or "\0" in name or ":" in name or name == MANIFEST_NAME
    try:
        bad = bad or len(name.encode()) > _MAX_NAME_BYTES
    except UnicodeEncodeError:
        bad = True
    if bad:
        raise CheckpointError(f"{manifest}: {name[:80]!r} is not the name of a file in its folder")


# --- files ---------------------------------------------------------------------------------------


def _files_below(folder: Path) -> list[tuple[str, Path]]:
    """(relative name, path) of every file below a folder.

    Raises:
        CheckpointError: there is a symbolic link, pipe, socket or device.
    """
    found, pending = [], [folder]
    while pending:
        for entry in os.scandir(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                path = Path(entry.path)
                found.append((path.relative_to(folder).as_posix(), path))
            else:
                name = os.path.relpath(entry.path, folder)
                raise CheckpointError(f"{folder}: {name} is not a regular file")
    return sorted(found)


def _open_regular(path: Path) -> Any:
    """Open for reading, but refuse links and everything that is not a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def _digest(path: Path, synchronise: bool = False) -> tuple[int, str]:
    """Size and SHA-256 of a file; ``synchronise`` also flushes it to the disk."""
    digest, size = hashlib.sha256(), 0
    with _open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
        if synchronise:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a temporary folder, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
