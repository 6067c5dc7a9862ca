# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a crash leaves the old state or the new one, and one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


class BusyFolderError(ValueError):
    """A folder that another run is writing to."""


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock", wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, a file in it; the system lets go when the process ends. A file
    system without locks is named in the log.

    Raises:
        BusyFolderError: another holds it, and ``wait`` is False.
    """
    with open(folder / name, "wb") as file:
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
        yield


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step: a crash leaves the old file or the new one, never a
    part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def synchronise(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk: only then does a rename
    outlive a power failure.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
