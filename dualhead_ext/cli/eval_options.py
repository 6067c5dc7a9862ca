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
  dualhead eval --suite paper --scale tiny --out run     all of it in a minute, to see that it works
  dualhead eval --suite paper --scale small --out run    an hour on two cores; again: goes on
  dualhead eval --scale small --out run --decoders backbone,dual_head,genarm_lora
  dualhead eval --scale gpu --out run --minutes 9 --state-mb 60        in pieces
  dualhead eval --suite steering --out run               what steering buys on a real model: hours
  dualhead eval --suite steering --out run --attributes sentiment --kl 0.1 \\
      --seeds 1 --systems backbone,dual-head-embedding-fixed      its headline: ten minutes

With HEADS, --out gets eval.json, eval.md and sweep.png: accuracy on pairs, KL, perplexity, alpha,
length and scores at each strength, and replies side by side. The suites compare whole systems: each
cell is kept in --out as it is computed; the tables and plots there show all that is done.
Data is looked for below --data or $DUALHEAD_DATA. Exit code 3: time ran out, cells are left."""


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("heads", nargs="?", help="folder of heads to measure; or give --suite")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for what is measured")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help='pairs or ranked lists as train reads them, "embedded" for the built-in test split; '
        "of --suite paper: folder of data (default $DUALHEAD_DATA)",
    )
    parser.add_argument(
        "--judge-url", metavar="URL", help="an OpenAI-compatible endpoint that judges texts"
    )
    _add_eval_heads(parser.add_argument_group("heads"))
    _add_eval_suite(parser.add_argument_group("suites"))


def _add_eval_heads(group: Any) -> None:
    """Without defaults, so that what is given beside --suite is found; they are eval_heads's."""

    def default(name: str) -> str:
        value = DEFAULTS[name]
        return f"(default {','.join(f'{x:g}' for x in value) if name == 'strengths' else value})"

    group.add_argument(
        "--strengths",
        type=numbers,
        metavar="S,...",
        help=f"to reply at; 0, the backbone, is always among them {default('strengths')}",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='a question a line, .jsonl rows with "prompt", or "open:measure" (default: the '
        "prompts of --data)",
    )
    group.add_argument(
        "--scorer",
        action="append",
        metavar="NAME",
        help="of the replies, as of dualhead sample; may be given several times",
    )
    group.add_argument(
        "--limit",
        type=number(int, 1),
        metavar="N",
        help=f"the first N rows and prompts (default: all rows, {PROMPTS} prompts)",
    )
    for name, low, text in (
        ("max_new_tokens", 1, "a longer reply is cut"),
        ("max_length", 2, "tokens of a pair's text, a longer one is cut"),
        ("batch_size", 1, "replies at once"),
        ("seed", 0, "of sampling"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=number(int, low, MAX_SEED),
            metavar="N",
            help=f"{text} {default(name)}",
        )
    group.add_argument(
        "--objective-weights", type=numbers, metavar="W,...", help="one number for each objective"
    )
    group.add_argument(
        "--backbone",
        help="folder, GGUF file or name of a backbone in place of the one the heads name",
    )
    group.add_argument("--device", type=device, help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--no-plot", action="store_true", default=None, help="no sweep.png, no need of matplotlib"
    )


def _add_eval_suite(parser: Any) -> None:
    parser.add_argument(
        "--suite", choices=("paper", "steering"), help="(default paper, where HEADS is not given)"
    )
    parser.add_argument(
        "--scale",
        choices=("tiny", "small", "standard", "gpu"),
        help="how large a run; of steering tiny or standard (default standard)",
    )
    parser.add_argument(
        "--decoders", type=names, metavar="NAME,...", help="systems to compare (default: all)"
    )
    parser.add_argument("--seeds", type=number(int, 1), metavar="N", help="of the headline systems")
    parser.add_argument(
        "--attributes", type=names, metavar="NAME,...", help="what to steer (default: all)"
    )
    parser.add_argument(
        "--systems", type=names, metavar="NAME,...", help="what to compare (default: all)"
    )
    parser.add_argument(
        "--kl",
        type=numbers,
        metavar="X,...",
        help="nats per token to decode at (default 0.1,0.05,0.2,0.4)",
    )
    parser.add_argument(
        "--judge-model", metavar="NAME", help="the model to ask at --judge-url for win rates"
    )
    parser.add_argument(
        "--minutes", type=number(float, 0), metavar="X", help="start no cell that would end later"
    )
    parser.add_argument(
        "--state-mb",
        type=number(float, 1),
        metavar="X",
        help="leave at most so much in DIR: drop models, those that nothing left needs first",
    )
