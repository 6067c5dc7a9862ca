# SPDX-License-Identifier: Apache-2.0
"""Run a script of this folder in several processes, with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(script: str, folder: Path, *words: str) -> None:
    """:func:`run_in_processes` with two."""
    run_in_processes(2, script, folder, *words)


def run_in_processes(count: int, script: str, folder: Path, *words: str) -> None:
    """Run ``script`` with ``folder`` and ``words`` as its arguments. It must end with
    :func:`leave`.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            *(str(Path(__file__).parent / script), str(folder), *words),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # enough for a slow, busy machine
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def leave() -> None:
    """End this process after its results are written, without finalising the interpreter.

    During finalisation, a thread of gloo may need the GIL to free the objects of a finished
    collective. Python would end the thread inside a destructor, and with it the process: "terminate
    called without an active exception". This is the likeliest reason for two such failures seen in
    one run on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
