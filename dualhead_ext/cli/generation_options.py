# SPDX-License-Identifier: Apache-2.0
"""The options of the commands that decode with heads, and their examples."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import FORMAT_NAMES
from ..head.controls import Controls
from .argument_types import MAX_SEED, add_color, add_device, number, numbers

# The types of a strength and of weights, on the command line and in a chat.
STRENGTH, WEIGHTS = number(float, Controls.LIMITS["strength"].lowest), numbers

GENERATE = """\
examples:
  dualhead generate heads "How do I keep bread fresh?"
  dualhead generate heads "Tell me a joke." --show-gate --strength 1.5
  dualhead generate heads "Tell me a joke." --html joke.html --strengths 0,0.5,1,2
  dualhead generate heads "Tell me a joke." --alpha 0.3 --sample --temperature 0.8 --seed 7
  dualhead generate heads "Tell me a joke." --backbone-only
  dualhead generate heads "Tell me a joke." --quantize int8
  echo "What is a gate?" | dualhead generate heads

A question is put into the tokenizer's chat template, or into a Human turn if there is none. The
text ends where the model ends its turn. --raw sends the prompt as it is and cuts nothing."""

CHAT = """\
examples:
  dualhead chat heads
  dualhead chat heads --strength 1.5 --show-gate
  dualhead chat heads --sample --temperature 0.8 --system "You answer in one sentence."
  printf 'Hello!\\n/compare\\n' | dualhead chat heads

/help lists the commands of the chat. Ctrl-C stops a reply, Ctrl-D ends the chat."""

INSPECT = """\
examples:
  dualhead inspect heads --text "The cake was a lie."
  dualhead inspect heads --prompt "How was the cake?" --text "It was a lie." --html cake.html
  dualhead inspect heads --text "The cake was a lie." --html cake.html --strengths 0,0.5,1,2

The page needs no network. It colours tokens by alpha. For each token it shows alpha, the
predictions of both heads and of their mixture, and the KL divergence of the mixture from the
backbone."""


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="folder written by train or save_pretrained")
    parser.add_argument("prompt", nargs="?", help="the prompt (default: standard input)")
    _add_model(parser)
    parser.add_argument(
        "--raw", action="store_true", help="send the prompt as it is, without a template"
    )
    parser.add_argument(
        "--backbone-only", action="store_true", help="decode with the backbone alone"
    )
    gate = _add_gate(parser)
    gate.add_argument("--show-gate", action="store_true", help="show alpha of each token")
    _add_page(gate)
    _add_decoding(parser, 128)
    add_color(parser)


def add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="folder written by train or save_pretrained")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first turn")
    _add_model(parser)
    gate = _add_gate(parser)
    gate.add_argument("--show-gate", action="store_true", help="show alpha of each token")
    _add_decoding(parser, 256)
    add_color(parser)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", help="folder written by train or save_pretrained")
    parser.add_argument("--text", required=True, help="the text to inspect")
    parser.add_argument(
        "--prompt", help="a question that the text answers (default: the text stands alone)"
    )
    _add_model(parser)
    _add_page(_add_gate(parser))
    add_color(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        help="folder, GGUF file or name of a backbone instead of the one that the heads name",
    )
    parser.add_argument(
        "--quantize",
        choices=FORMAT_NAMES,
        help="quantise both heads (default: as stored in the folder)",
    )
    add_device(parser)


def _add_gate(parser: argparse.ArgumentParser) -> Any:
    gate = parser.add_argument_group("gate")
    for name, limits in Controls.LIMITS.items():
        gate.add_argument(
            f"--{name.replace('_', '-')}",
            type=number(float, limits.lowest, limits.highest),
            metavar=limits.metavar,
            help=limits.help,
        )
    gate.add_argument(
        "--objective-weights", type=WEIGHTS, metavar="W,...", help="one weight per objective"
    )
    return gate


def _add_page(gate: Any) -> None:
    gate.add_argument(
        "--html",
        metavar="FILE",
        help="write a page with alpha and both heads' predictions for each token",
    )
    gate.add_argument(
        "--strengths",
        type=numbers,
        metavar="S,...",
        help="strengths that the page's slider offers (default: --strength)",
    )


def _add_decoding(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    sampling = parser.add_argument_group("decoding")
    sampling.add_argument(
        "--max-new-tokens",
        type=number(int, 1),
        default=new_tokens,
        metavar="N",
        help=f"stop after this many tokens (default {new_tokens})",
    )
    sampling.add_argument("--sample", action="store_true", help="sample (default: greedy decoding)")
    for name, kind, text in (
        ("temperature", number(float, 1e-6), "default 1"),
        ("top-k", number(int, 0), "default 0: all"),
        ("top-p", number(float, 0, 1), "default 1"),
        ("min-p", number(float, 0, 1), "default 0"),
    ):
        sampling.add_argument(
            f"--{name}", type=kind, metavar="X", help=f"implies --sample ({text})"
        )
    sampling.add_argument(
        "--seed",
        type=number(int, 0, MAX_SEED),
        default=0,
        metavar="N",
        help="seed of sampling (default 0)",
    )
