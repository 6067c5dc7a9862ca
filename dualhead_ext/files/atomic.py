# SPDX-License-Identifier: Apache-2.0
"""Atomic writes of files, and locks of folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(.+)\.(\d{1,18})\.tmp", re.DOTALL)

logger = logging.getLogger(__name__)


class BusyFolderError(ValueError):
    """Another run is writing to the folder."""


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock", wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, which is a file in it. A missing folder is made. At the end the
    file is removed, and so are the folders made for it, unless they have been used. The system
    releases the lock when the process ends. On a file system without locks, a warning is logged.

    Raises:
        BusyFolderError: another process holds it, and ``wait`` is False.
        OSError: the disk.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked_file(folder, name, wait):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
                for path in made:
                    path.rmdir()


def _locked_file(folder: Path, name: str, wait: bool) -> BinaryIO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            try:
                file = opened.enter_context(open(folder / name, "wb"))
                _lock(file, folder, wait)
                found = os.stat(folder / name)
            except FileNotFoundError:  # whoever held the lock has removed its file
                continue
            if os.path.samestat(os.fstat(file.fileno()), found):
                opened.pop_all()
                return file


def _lock(file: BinaryIO, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise BusyFolderError(
            f"{folder}: another run is writing to this folder; wait for it to end, or choose "
            "another one"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("%s has no file locks: write to it from one run at a time", folder)


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically: after a crash it is the old file or the new one."""
    replace_files(path.parent, {path.name: data})


def replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Replace several files of a folder, in this order. All are written completely under temporary
    names before the first one is renamed. After a crash between two renames, the files that were
    not renamed are among the :func:`leftovers`. Leftovers of these files are removed at the end.

    Raises:
        OSError: the disk. If it happens before the first rename, nothing has changed.
    """
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    waiting = list(files)
    try:
        for name, data in files.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        while waiting:
            os.replace(temporary[waiting[0]], folder / waiting[0])
            del waiting[0]
        for path, _ in leftovers(folder, files):
            path.unlink(missing_ok=True)
    except BaseException:
        if len(waiting) == len(files):  # otherwise the remaining ones are still needed
            for path in temporary.values():
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        raise
    synchronise(folder)


def leftovers(folder: Path, names: Iterable[str]) -> list[tuple[Path, str]]:
    """(path, name) of temporary files with these names that killed processes have left."""
    names, found = set(names), []
    for entry in sorted(os.listdir(folder)):
        match = _TEMPORARY.fullmatch(entry)
        if match and match[1] in names and not _is_another_process(int(match[2])):
            found.append((folder / entry, match[1]))
    return found


def _is_another_process(number: int) -> bool:
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def synchronise(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk. Only then does a rename
    survive a power failure.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
