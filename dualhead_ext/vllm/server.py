# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server, in its own process, for a folder written by
:func:`dualhead_ext.model.export.export`.
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

# Not the command `vllm serve`: it needs metadata that the CPU wheel has under a different name.
_MODULE = "vllm.entrypoints.openai.api_server"
_MIDDLEWARE = f"{__name__.rpartition('.')[0]}.answers.AlphaInAnswer"
# On a CPU, vLLM refuses to start unless 92 % of the machine's memory is free.
_CPU_CACHE_GIB = 4
_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")


def installed() -> bool:
    """Whether vLLM is in this environment."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # not merely a folder with that name


def environment(options: Sequence[str]) -> dict[str, str]:
    """The environment variables of vLLM's server. On a CPU, its cache has 4 GiB unless ``options``
    or the caller's environment choose; on a GPU, vLLM does not read that variable.
    """
    preset = {"VLLM_NO_USAGE_STATS": "1"}
    names = {option.partition("=")[0].replace("_", "-") for option in options}
    if not names.intersection(_CACHE_OPTIONS):  # the variable would override them
        preset["VLLM_CPU_KVCACHE_SPACE"] = str(_CPU_CACHE_GIB)
    return preset | os.environ


def run(
    folder: Path, name: str, host: str, port: int, grace: int, options: Sequence[str] = ()
) -> int:
    """Serve until SIGTERM or Ctrl-C. Then requests that are running may finish, for at most
    ``grace`` seconds.

    Args:
        name: model name for clients.
        options: further options for vLLM, as on its command line.
    Returns:
        vLLM's exit code; 0 after SIGTERM or Ctrl-C.
    """
    command = [sys.executable, "-m", _MODULE, "--model", str(folder), "--served-model-name", name]
    command += ["--host", host, "--port", str(port), "--middleware", _MIDDLEWARE]
    command += ["--shutdown-timeout", str(grace), *options]
    told = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        process.send_signal(signum)

    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        # Its own session: Ctrl-C reaches it once, through this process.
        process = subprocess.Popen(command, env=environment(options), start_new_session=True)
        for number in before:
            signal.signal(number, stop)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if told else code
