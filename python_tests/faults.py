# SPDX-License-Identifier: Apache-2.0
"""Crashes and full disks at every point of a save.

A test passes a script to `run`, which runs it in a child process under `fault_shim.c`. The script
calls `every_point` with three functions. Each point is tried in a fork of its own, with a fresh
folder.
"""

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
COUNT, KILL, FAIL_ONCE, FAIL_FROM, SHORT = 1, 2, 3, 4, 5
KINDS = {
    "kill": (KILL, 0),
    "full": (FAIL_FROM, errno.ENOSPC),
    "broken": (FAIL_ONCE, errno.EIO),
    "interrupted": (FAIL_ONCE, errno.EINTR),
    "short": (SHORT, 0),
}


# --- in pytest -----------------------------------------------------------------------------------


def run(script, folder):
    """Run a script with the modules that it imports; returns the JSON that it prints last."""
    shim = folder / "fault_shim.so"
    source = HERE / "fault_shim.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True, timeout=60
    )
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
        "FAULT_SHIM": str(shim),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,  # enough for a slow, busy machine
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- in the child --------------------------------------------------------------------------------


def _shim():
    library = ctypes.CDLL(os.environ["FAULT_SHIM"])
    library.shim_log.restype = ctypes.c_char_p
    return library


def _fresh(prepare):
    folder = Path(tempfile.mkdtemp(dir=".")).resolve()
    prepare(folder)
    return folder


def record(prepare, act):
    """Calls of ``act(folder)`` that change the disk: a list of [call, path, other path]."""
    folder, shim = _fresh(prepare), _shim()
    shim.shim_arm(COUNT, 0, 0)
    act(folder)
    log, calls = shim.shim_log().decode(), shim.shim_calls()
    shim.shim_arm(0, 0, 0)
    entries = [line.split("\t") for line in log.splitlines()]
    assert len(entries) == calls
    root = os.path.realpath(folder)
    return [
        [call, *(os.path.relpath(os.path.join(root, p), root) if p else "" for p in paths)]
        for call, *paths in entries
    ]


def every_point(kind, prepare, act, check, only=None):
    """Try ``act(folder)`` with a fault at each of its calls. Returns {"points": ..., "problems":
    [...]}.

    only: if given, only the calls whose entry in the record satisfies ``only(entry)`` are tried.
    check: ``check(folder, outcome)`` returns what is wrong, or None. outcome is "killed", "done" or
    the text of the error.
    """
    mode, code = KINDS[kind]
    entries = record(prepare, act)
    points = [i + 1 for i, e in enumerate(entries) if only is None or only(e)]
    problems = []
    for point in points:
        folder = _fresh(prepare)
        outcome = _in_fork(folder, act, mode, point, code)
        problem = check(folder, outcome)
        if problem:
            problems.append(f"{kind} at call {point} {entries[point - 1]}: {problem} ({outcome})")
        shutil.rmtree(folder)
    return {"points": len(points), "problems": problems}


def _in_fork(folder, act, mode, point, code):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        shim = _shim()
        try:
            shim.shim_arm(mode, point, code)
            act(folder)
            outcome = "done"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            if not isinstance(error, (OSError, ValueError, RuntimeError)):
                outcome += "".join(traceback.format_exception(error))
        shim.shim_arm(0, 0, 0)
        os.write(write_end, outcome.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else outcome
