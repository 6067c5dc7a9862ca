# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server for a folder of :func:`dualhead_ext.model.export.export`, as a
process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

# Not the command `vllm serve`: it asks for metadata that the wheel for CPUs has by another name.
_MODULE = "vllm.entrypoints.openai.api_server"
_MIDDLEWARE = f"{__name__.rpartition('.')[0]}.answers.AlphaInAnswer"


def installed() -> bool:
    """Whether vLLM is in this environment."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # not just a folder of that name


def run(folder: Path, name: str, host: str, port: int, options: Sequence[str] = ()) -> int:
    """Serve until the process is told to stop (SIGTERM, Ctrl-C), which lets vLLM end its work.

    Args:
        name: of the model, for clients. options: more of vLLM's, as on its command line.
    Returns:
        vLLM's exit code; 0 where it was told to stop.
    """
    command = [sys.executable, "-m", _MODULE, "--model", str(folder), "--served-model-name", name]
    command += ["--host", host, "--port", str(port), "--middleware", _MIDDLEWARE, *options]
    told = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        process.send_signal(signum)

    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        # Its own session: Ctrl-C reaches it once, through this process.
        process = subprocess.Popen(
            command, env={"VLLM_NO_USAGE_STATS": "1"} | os.environ, start_new_session=True
        )
        for number in before:
            signal.signal(number, stop)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if told else code
