# SPDX-License-Identifier: Apache-2.0
"""The options of ``dualhead eval`` and its examples. Imports neither torch nor transformers."""

from __future__ import annotations

import argparse
from typing import Any

from .argument_types import MAX_SEED, device, names, number, numbers
from .eval_heads import DEFAULTS, PROMPTS

EXAMPLES = """\
examples:
  dualhead eval heads --data pairs.jsonl --out report    your heads against their backbone
  dualhead eval heads --data pairs.jsonl --prompts questions.txt --strengths 0,0.5,1,2 \\
      --scorer vader --scorer words --out report
  dualhead eval heads --prompts open:measure --scorer afinn --limit 64 --out report
  dualhead eval --suite paper --scale tiny --out run     a minute, to see that everything works
  dualhead eval --suite paper --scale small --out run    an hour on two cores; run again to continue
  dualhead eval --scale small --out run --decoders backbone,dual_head,genarm_lora
  dualhead eval --scale gpu --out run --minutes 9 --state-mb 60        in pieces of nine minutes
  dualhead eval --suite steering --out run               steering of a real model: takes hours
  dualhead eval --suite steering --out run --attributes sentiment --kl 0.1 \\
      --seeds 1 --systems backbone,dual-head-embedding-fixed      its headline: ten minutes

With HEADS, --out gets eval.json, eval.md and sweep.png: accuracy on pairs; KL, perplexity, alpha,
length and scores at each strength; and replies side by side. The suites compare whole systems. They
store each cell in --out when it is computed; the tables and plots there show all finished cells.
The suites read data from --data or $DUALHEAD_DATA. Exit code 3: --minutes is over, cells are
left."""


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", nargs="?", help="folder of heads to measure; or give --suite")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help='pairs or ranked lists as train reads them, "embedded" for the built-in test split; '
        "for --suite paper: folder of data (default $DUALHEAD_DATA)",
    )
    parser.add_argument(
        "--judge-url",
        metavar="URL",
        help="address of an OpenAI-compatible endpoint that judges texts",
    )
    _add_eval_heads(parser.add_argument_group("heads"))
    _add_eval_suite(parser.add_argument_group("suites"))


def _add_eval_heads(group: Any) -> None:
    """Declare the options without defaults, so that those given with --suite are noticed.
    `eval_heads.DEFAULTS` has the defaults.
    """

    def default(name: str) -> str:
        value = DEFAULTS[name]
        return f"(default {','.join(f'{x:g}' for x in value) if name == 'strengths' else value})"

    group.add_argument(
        "--strengths",
        type=numbers,
        metavar="S,...",
        help=f"strengths to measure; 0, the backbone, is always measured {default('strengths')}",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='one question per line, .jsonl rows with "prompt", or "open:measure" (default: the '
        "prompts of --data)",
    )
    group.add_argument(
        "--scorer",
        action="append",
        metavar="NAME",
        help="scorer of the replies, as in dualhead sample; may be given several times",
    )
    group.add_argument(
        "--limit",
        type=number(int, 1),
        metavar="N",
        help=f"use the first N rows and prompts (default: all rows, {PROMPTS} prompts)",
    )
    for name, low, text in (
        ("max_new_tokens", 1, "a longer reply is cut to this many tokens"),
        ("max_length", 2, "a longer text of a pair is cut to this many tokens"),
        ("batch_size", 1, "replies sampled at once"),
        ("seed", 0, "seed of sampling"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=number(int, low, MAX_SEED),
            metavar="N",
            help=f"{text} {default(name)}",
        )
    group.add_argument(
        "--objective-weights", type=numbers, metavar="W,...", help="one weight per objective"
    )
    group.add_argument(
        "--backbone",
        help="folder, GGUF file or name of a backbone instead of the one that the heads name",
    )
    group.add_argument("--device", type=device, help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--no-plot",
        action="store_true",
        default=None,
        help="do not write sweep.png, which needs matplotlib",
    )


def _add_eval_suite(parser: Any) -> None:
    parser.add_argument(
        "--suite",
        choices=("paper", "steering"),
        help="the suite to run (default: paper, if HEADS is not given)",
    )
    parser.add_argument(
        "--scale",
        choices=("tiny", "small", "standard", "gpu"),
        help="size of the run; for steering tiny or standard (default standard)",
    )
    parser.add_argument(
        "--decoders", type=names, metavar="NAME,...", help="systems to compare (default: all)"
    )
    parser.add_argument(
        "--seeds", type=number(int, 1), metavar="N", help="number of seeds of the headline systems"
    )
    parser.add_argument(
        "--attributes", type=names, metavar="NAME,...", help="attributes to steer (default: all)"
    )
    parser.add_argument(
        "--systems",
        type=names,
        metavar="NAME,...",
        help="systems of the steering suite (default: all)",
    )
    parser.add_argument(
        "--kl",
        type=numbers,
        metavar="X,...",
        help="KL targets in nats per token (default 0.1,0.05,0.2,0.4)",
    )
    parser.add_argument(
        "--judge-model", metavar="NAME", help="model at --judge-url that judges win rates"
    )
    parser.add_argument(
        "--minutes",
        type=number(float, 0),
        metavar="X",
        help="time limit: start no cell that would end later",
    )
    parser.add_argument(
        "--state-mb",
        type=number(float, 1),
        metavar="X",
        help="keep at most this much in DIR: models that are no longer needed are deleted first",
    )
