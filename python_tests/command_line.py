# SPDX-License-Identifier: Apache-2.0
"""`dualhead` in this process and as a command, and options for a short training run."""

import json
import sys
from pathlib import Path

import dualhead_ext as dh
from dualhead_ext import cli

COMMAND = [sys.executable, "-m", "dualhead_ext.cli"]
# Options for a training run of a few seconds.
TINY = ["--max-steps", "2", "--batch-size", "2", "--accumulate", "1", "--max-length", "64"]
TINY += ["--preset", "paper"]


def run(*argv: str) -> int:
    """Run the command in this process; returns its exit code."""
    try:
        return cli.main(argv)
    except SystemExit as stop:  # argparse
        return stop.code


def write_pairs(path: Path, count: int) -> Path:
    rows = dh.data.load_preference_data("embedded", "test")[:count]
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path
