# SPDX-License-Identifier: Apache-2.0
"""``dualhead serve``: an OpenAI-compatible server of a gated model."""

from __future__ import annotations

import errno
import importlib.util
import socket
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from ..vllm import server
from .errors import UserError, argument, one_line
from .models import check_heads, load, quiet_transformers

# Seconds that running requests may still take after SIGTERM.
GRACE = 30
_INSTALL = "https://docs.vllm.ai/en/latest/getting_started/installation"


def serve(arguments: Namespace) -> int:
    """Serve with vLLM where it is installed, otherwise with transformers' continuous batching."""
    check_heads(arguments)
    engine = arguments.engine
    if engine == "auto":
        engine = "vllm" if server.installed() else "transformers"
    elif engine == "vllm" and not server.installed():
        raise UserError(
            "vLLM is not installed in this environment; docs/serving.md says how to make one for "
            f"it, on a CPU by `make vllm-env`, with a GPU see {_INSTALL}"
        )
    _check_options(arguments, engine)
    _check_port(arguments.host, arguments.port)
    name = arguments.name or Path(arguments.heads).resolve().name
    return (_with_vllm if engine == "vllm" else _with_transformers)(arguments, name)


def _check_options(arguments: Namespace, engine: str) -> None:
    given = {
        "vllm": {"--device": arguments.device != "auto", "--positions": arguments.positions},
        "transformers": {"options after --": arguments.vllm_options},
    }
    for option, value in given[engine].items():
        if value:
            other = "transformers" if engine == "vllm" else "vllm"
            raise UserError(f"{option}: only --engine {other} takes it, and this is {engine}")


def _with_vllm(arguments: Namespace, name: str) -> int:
    """Serve an exported folder, or export heads and backbone to a temporary folder of links."""
    with argument():
        quiet_transformers(arguments.backbone)
        from ..model.export import export
        from ..model.served_folder import holds_backbone
    heads = Path(arguments.heads)
    where = arguments.host, arguments.port, GRACE, arguments.vllm_options
    _announce(arguments, name, "vLLM", "; /health says when it is ready")
    if arguments.backbone is None and holds_backbone(heads):
        return server.run(heads, name, *where)
    with tempfile.TemporaryDirectory(prefix="dualhead-serve-") as folder:
        with argument():
            served = export(
                arguments.heads, Path(folder) / "model", arguments.backbone, symbolic=True
            )
        return server.run(served, name, *where)


def _with_transformers(arguments: Namespace, name: str) -> int:
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError(
            "the server needs vLLM or the package aiohttp, and neither is installed; install one "
            "with: pip install 'dualhead_ext[serve]'"
        )
    with argument():
        quiet_transformers(arguments.backbone)
    from . import openai_server
    from .batching_engine import BatchingEngine

    model, tokenizer = load(Namespace(**vars(arguments), quantize=None))
    with argument("--positions"):
        try:
            engine = BatchingEngine(model, tokenizer, arguments.positions)
        except NotImplementedError as error:
            raise UserError(f"serve: {one_line(error)}") from error
    for setting in engine.ignored:
        print(f"the backbone's {setting} is not applied by this engine", file=sys.stderr)

    def ready() -> None:
        _announce(arguments, name, "transformers' continuous batching", "")

    try:
        openai_server.run(engine, name, arguments.host, arguments.port, GRACE, ready)
    except OSError as error:
        raise _port_error(arguments.host, arguments.port, error) from error
    return 0


def _announce(arguments: Namespace, name: str, engine: str, more: str) -> None:
    where = f"http://{arguments.host}:{arguments.port}/v1"
    print(f"{name} on {where}, with {engine}{more}", flush=True)


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror as error:
        raise UserError(f"--host: expected an address, got {host} ({error.strerror})") from error
    except OSError as error:
        raise _port_error(host, port, error) from error


def _port_error(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port: expected a free port of {host}, got {port}, which is in use")
    return UserError(f"--port: {host}:{port} cannot be listened on ({error.strerror})")
