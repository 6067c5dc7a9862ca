# SPDX-License-Identifier: Apache-2.0
"""Files with one JSON object per line: plain, which may grow, and packed, to be published."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(line, rows)))


def read(path: Path) -> list[Row]:
    """The complete lines; a last line that was cut off is left out."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(found) for found in whole.splitlines() if found]


def pack(rows: Iterable[Row], path: Path) -> None:
    """Write rows as .jsonl.gz, byte for byte reproducible."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write(line(row))


def unpack(path: Path) -> list[Row]:
    """The rows of a file that :func:`pack` wrote.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        with gzip.open(path, "rb") as file:
            rows = [json.loads(found) for found in file]
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"suite: {path} must be gzip with one JSON object per line") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"suite: {path} must hold one JSON object per line")
    return rows
