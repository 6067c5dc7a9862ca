# SPDX-License-Identifier: Apache-2.0
"""Options of ``dualhead export`` and ``dualhead serve``."""

from __future__ import annotations

import argparse

from .argument_types import add_device, number

EXPORT = """\
examples:
  dualhead export heads --output served           other programs load it as the plain backbone
  dualhead export heads --backbone ./llama --output served"""

SERVE = """\
examples:
  dualhead serve heads
  dualhead serve served --port 9000
  dualhead serve heads --engine transformers      without vLLM although it is installed
  dualhead serve heads -- --max-model-len 2048    options of vLLM's server follow --

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "heads", "messages": [{"role": "user", "content": "Hello"}],
         "vllm_xargs": {"strength": 2.0, "return_alpha": true}}'"""


def _add_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="folder of heads, or a hub name")
    parser.add_argument(
        "--backbone",
        help="folder, GGUF file, hub name or built-in backbone (default: the one stored with the "
        "heads)",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    _add_heads(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new or empty folder; weights are hard-linked if possible, otherwise copied",
    )


def add_serve(parser: argparse.ArgumentParser) -> None:
    _add_heads(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this "
        "machine only)",
    )  # fmt: skip
    parser.add_argument(
        "--port",
        type=number(int, 1, 65535),
        default=8000,
        metavar="N",
        help="port to listen on (default %(default)s)",
    )
    parser.add_argument("--name", help="model name for clients (default: the folder's name)")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="auto (default): vllm where it is installed, otherwise transformers' continuous "
        "batching",
    )
    engine = parser.add_argument_group("options of --engine transformers")
    add_device(engine)
    engine.add_argument(
        "--positions",
        type=number(int, 32, 2**31 - 1),
        metavar="N",
        help="size of the cache, in tokens of all requests together, prompts and new ones "
        "(default on a CPU: the model's context, at most 8192; on a GPU: what its memory allows)",
    )
