# SPDX-License-Identifier: Apache-2.0
"""`dualhead` in a pseudo-terminal, with a simulated user."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *argv, **env):
        self.fd, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dualhead_ext.cli", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""

    def until(self, pattern, timeout=300):
        """The output up to and including a match, which is removed from the buffer."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.seen)) is None:
            ready = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]
            if not ready:
                raise TimeoutError(f"no {pattern!r} in {self.seen!r}")
            try:
                self.seen += os.read(self.fd, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # on Linux this means that the other end is closed
                raise AssertionError(f"ended before {pattern!r}: {self.seen!r}") from None
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self, pattern):
        """Press Ctrl-C until the pattern appears.

        Python's input() misses a Ctrl-C between readline's prompt and its wait for a key. A person
        would press it again.
        """
        for _ in range(20):
            self.type("\x03")
            try:
                return self.until(pattern, timeout=5)
            except TimeoutError:
                continue
        raise AssertionError(f"no {pattern!r} in {self.seen!r}")

    def end(self):
        """The rest of its output, and its exit code."""
        text = ""
        try:
            while True:
                text += self.until(r"(?s).+")
        except AssertionError:
            return text, self.process.wait(timeout=300)
