# SPDX-License-Identifier: Apache-2.0
"""Results as JSON lines, which survive a kill at any moment, and the log."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

PASSED, FAILED, TIMED_OUT, DID_NOT_RUN = "passed", "failed", "timed out", "did not run"
_LONGEST_TEXT = 2000  # of one value in a line


class Lines:
    """A file of JSON lines. Each line is one write, so a reader sees complete lines only."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Append a row; long texts are shortened in the middle."""
        row = {key: _shortened(value) for key, value in row.items()}
        append(self.path, json.dumps(row) + "\n")
        with self._lock:
            self.rows.append(row)


def append(path: Path, text: str) -> None:
    """Append a text with one write."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, text.encode(errors="replace"))
    finally:
        os.close(file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _shortened(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= _LONGEST_TEXT:
        return value
    half = _LONGEST_TEXT // 2
    return f"{value[:half]} ... {value[-half:]}"


def tail(text: str, count: int = 15) -> str:
    """The last lines of a text."""
    return "\n".join(text.strip().splitlines()[-count:])
