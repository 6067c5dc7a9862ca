# SPDX-License-Identifier: Apache-2.0
"""Runs a script of this folder in two processes, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_two_processes(script: str, folder: Path) -> None:
    """``script``, which ends with :func:`leave`, gets ``folder`` as its argument."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            *(str(Path(__file__).parent / script), str(folder)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # for a machine that is slow and busy
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def leave() -> None:
    """End this process, its results written, without the interpreter's finalization.

    In it, a thread of gloo that wants the GIL, to free what a collective long done had held, would
    be ended by Python inside a destructor, and so the process: "terminate called without an active
    exception", seen twice in one run on a busy machine, that being the likeliest reason.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
