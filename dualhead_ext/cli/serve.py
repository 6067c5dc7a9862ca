# SPDX-License-Identifier: Apache-2.0
"""``dualhead serve``: serves a gated model with vLLM's OpenAI-compatible server."""

from __future__ import annotations

import errno
import socket
import tempfile
from argparse import Namespace
from pathlib import Path

from ..vllm import server
from .errors import UserError, argument
from .models import check_heads, quiet_transformers

_INSTALL = "https://docs.vllm.ai/en/latest/getting_started/installation"


def serve(arguments: Namespace) -> int:
    """Serve an exported folder, or export heads and backbone to a temporary folder of links."""
    check_heads(arguments)
    if not server.installed():
        raise UserError(
            "vLLM is not installed in this environment; docs/serving.md says how to make one for "
            f"it, on a CPU by `make vllm-env`, with a GPU see {_INSTALL}"
        )
    _check_port(arguments.host, arguments.port)
    with argument():
        quiet_transformers(arguments.backbone)
        from ..model.export import export
        from ..model.served_folder import holds_backbone
    heads = Path(arguments.heads)
    name = arguments.name or heads.resolve().name
    where = arguments.host, arguments.port, arguments.vllm_options
    print(f"{name} on http://{arguments.host}:{arguments.port}/v1, /health says when it is ready")
    if arguments.backbone is None and holds_backbone(heads):
        return server.run(heads, name, *where)
    with tempfile.TemporaryDirectory(prefix="dualhead-serve-") as folder:
        with argument():
            served = export(
                arguments.heads, Path(folder) / "model", arguments.backbone, symbolic=True
            )
        return server.run(served, name, *where)


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror as error:
        raise UserError(f"--host: expected an address, got {host} ({error.strerror})") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--port: expected a free port of {host}, got {port}, which is in use"
            ) from error
        raise UserError(
            f"--port: {host}:{port} cannot be listened on ({error.strerror})"
        ) from error
