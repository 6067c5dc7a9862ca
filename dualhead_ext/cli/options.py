# SPDX-License-Identifier: Apache-2.0
"""The options of each command, their types and their examples. Imports neither torch nor
transformers: ``dualhead --help`` is instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from .. import bench
from ..config import GATE_NAMES, MIX_NAMES, REWARD_HEAD_NAMES, DualHeadConfig
from ..eval.scorers import SCORERS
from ..train.presets import PRESET_NAMES, PRESETS
from . import completion
from .argument_types import MAX_SEED, add_color, add_device, number
from .eval_options import EXAMPLES as EVAL_EXAMPLES
from .eval_options import add_eval
from .generation_options import CHAT, GENERATE, INSPECT, add_chat, add_generate, add_inspect
from .serving_options import EXPORT, SERVE, add_export, add_serve
from .training_options import add_training

OVERVIEW = """\
examples:
  dualhead demo                                   steer a real model in a few minutes
  dualhead sample --backbone smollm2 --prompts open --scorer vader --out ranked.jsonl
  dualhead train --backbone smollm2 --data ranked.jsonl --output heads
  dualhead generate heads "How do I keep bread fresh?" --show-gate
  dualhead <command> --help                       more examples"""

_TRAIN = """\
examples:
  dualhead train --output heads                   the embedded backbone and its sample of pairs
  dualhead train --backbone smollm2 --output heads            a chat model of 135M parameters
  dualhead train --backbone model.gguf --data pairs.jsonl --output heads
  dualhead train --backbone ./llama --data pairs.jsonl --eval-data test.jsonl --output heads
  dualhead train --data pairs.jsonl.gz --gate linear --mix probs --learning-rate 1e-3 --output heads
  dualhead train --output heads --resume          continue from the last complete checkpoint
  dualhead train --output heads --epochs 3 --cache-hidden hidden     run the backbone only once
  dualhead train --output heads --report-to tensorboard
  dualhead train --preset paper --output heads    the paper's head and objective
  dualhead train --config run.yaml --learning-rate 1e-3
  dualhead train --output heads --set max_grad_norm=0.5 --set bf16=true

Ctrl-C or SIGTERM stops the run and writes a checkpoint to continue from. --output gets the
heads, their model card and training.png.
Rows need prompt, chosen and rejected; or chosen and rejected as whole dialogues (HH-RLHF); or
prompt, responses and scores."""

_SAMPLE = """\
examples:
  dualhead sample --backbone smollm2 --prompts open --scorer vader --out ranked.jsonl
  dualhead sample --backbone ./llama --prompts questions.txt --scorer rules:score -n 8 --out r.jsonl
  dualhead sample --prompts rows.jsonl --scorer reward-model:./reward --out ranked.jsonl
  dualhead sample --prompts rows.jsonl --scorer judge:NAME --judge-url http://localhost:8000/v1 \\
      --out ranked.jsonl

If the command is interrupted, run it again to continue. Prompts are one question per line, or
.jsonl rows with "prompt"; "open" is a set of 208 neutral prompts that comes with this package."""

_INFO = """\
examples:
  dualhead info
  dualhead info heads                             describe a folder of heads
  dualhead info --json"""

_BENCH = """\
examples:
  dualhead bench --quick
  dualhead bench --json results.json
  dualhead bench --device cuda --part training models
  dualhead bench --report results.json            print earlier results as a table"""

_DEMO = """\
examples:
  dualhead demo
  dualhead demo --output heads --color never
  dualhead demo --backbone embedded               on a tiny model, in seconds
  dualhead demo --web --output heads              a page for heads that exist already

The page shows the backbone's reply beside the gated one, and alpha of each token."""


def _config_defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(DualHeadConfig) if f.default is not MISSING}


def add_train(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--backbone",
        default="embedded",
        help='folder, GGUF file or hub name of a causal LM, "smollm2" or "embedded" (default)',
    )
    data.add_argument(
        "--data",
        default="embedded",
        help="preference pairs or ranked lists: a file (JSON lines, JSON, CSV, Parquet), a folder "
        'of the datasets library, a hub name, or "embedded" (default)',
    )
    data.add_argument("--split", help="split to train on, for folders and hub names")
    data.add_argument("--eval-data", help="held-out pairs (default: see --eval-share)")
    data.add_argument(
        "--eval-share",
        type=number(float, 0.0, 0.9),
        default=0.1,
        metavar="X",
        help="without --eval-data, the share of --data to hold out, by prompts; the embedded "
        "sample has a test split of its own (default 0.1; 0: measure nothing)",
    )
    data.add_argument(
        "--limit",
        type=number(int, 1),
        metavar="N",
        help="train on the first N rows, and measure on at most N",
    )
    data.add_argument(
        "--streaming",
        action="store_true",
        help="read --data while training, for data that does not fit in memory; needs --max-steps",
    )
    data.add_argument("--output", required=True, help="folder for heads and checkpoints")
    data.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="continue from a checkpoint (default: the last complete one in --output)",
    )
    data.add_argument("--overwrite", action="store_true", help="replace the heads in --output")
    add_device(data)

    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options by their names; options on the command line override them",
    )
    parser.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        default="default",
        help="a complete recipe; other options override it (default: default)",
    )
    head = parser.add_argument_group("heads")
    default = _config_defaults()
    head.add_argument("--gate", choices=GATE_NAMES)
    head.add_argument("--mix", choices=MIX_NAMES, default=default["mix"])
    head.add_argument("--reward-head", choices=REWARD_HEAD_NAMES)
    for name, kind in (
        ("reward_rank", number(int, 0)),
        ("gate_num_heads", number(int, 1)),
        ("gate_head_dim", number(int, 1)),
        ("gate_alpha", number(float, 0, 1)),
        ("num_objectives", number(int, 1)),
    ):
        option = f"--{name.replace('_', '-')}"
        head.add_argument(option, type=kind, default=default[name], metavar="X")
    for action in head._group_actions:
        if any(action.dest in preset["head"] for preset in PRESETS.values()):
            action.default, action.help = None, "(default: from the preset)"
        else:
            action.help = f"(default {action.default})"

    add_training(parser)


def add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone",
        default="embedded",
        help='folder, GGUF file or hub name of a causal LM, "smollm2" or "embedded" (default)',
    )
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help='questions, or "open": see below'
    )
    parser.add_argument(
        "--scorer",
        required=True,
        metavar="NAME",
        help=f"what ranks the responses: {', '.join(SCORERS)}; or module:function (prompt, "
        "response -> number, higher is better), reward-model:FOLDER (a classifier with one label), "
        "judge:MODEL",
    )
    parser.add_argument(
        "--judge-url", metavar="URL", help="address of an OpenAI-compatible endpoint"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSON-lines file for the ranked responses"
    )
    parser.add_argument(
        "-n", type=number(int, 2), default=6, metavar="N", help="responses to a prompt (default 6)"
    )
    for name, kind, default, text in (
        ("max-new-tokens", number(int, 1), 64, "a longer response is cut to this many tokens"),
        ("temperature", number(float, 1e-6), 1.0, "sampling temperature"),
        ("seed", number(int, 0), 0, "seed of sampling"),
        ("batch-size", number(int, 1), 48, "responses sampled at once"),
    ):
        help_text = f"{text} (default {default:g})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=help_text)
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="use the first N prompts")
    add_device(parser)


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "heads", nargs="?", help="folder of heads to describe (default: the installation)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default="dualhead-demo",
        metavar="DIR",
        help="folder for the heads, which are overwritten (default %(default)s)",
    )
    parser.add_argument(
        "--backbone",
        choices=("smollm2", "embedded"),
        default="smollm2",
        help="SmolLM2-135M-Instruct (default), or the tiny built-in model, which takes seconds",
    )
    parser.add_argument(
        "--web",
        action="store_true",
        help="serve a page on this machine; heads that exist in --output are used",
    )
    parser.add_argument(
        "--port",
        type=number(int, 0, 65535),
        metavar="N",
        help="port of the page (default 8765; 0: any free port)",
    )
    for name, low, high, default, text in (
        ("prompts", 16, 208, 96, "built-in prompts to sample and train on, of 208"),
        ("test-prompts", 3, 208, 48, "other built-in prompts to measure on, of 208"),
        ("new-tokens", 1, 1024, 32, "tokens to generate per text"),
        ("seed", 0, MAX_SEED, 0, "seed of all random numbers"),
    ):
        help_text = f"{text} (default {default})"
        parser.add_argument(
            f"--{name}",
            type=number(int, low, high),
            default=default,
            metavar="N",
            help=help_text,
        )
    add_color(parser)


# Command -> (function that declares its options, what it does, examples)
OPTIONS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "train": (add_train, "train a reward head and a gate on preference pairs", _TRAIN),
    "generate": (add_generate, "decode a prompt and print each token as it comes", GENERATE),
    "chat": (add_chat, "chat with a model and steer its replies", CHAT),
    "inspect": (
        add_inspect,
        "show alpha and the predictions of both heads for each token of a text",
        INSPECT,
    ),
    "sample": (add_sample, "sample and rank responses to train on", _SAMPLE),
    "export": (add_export, "write heads and backbone as a folder for vLLM", EXPORT),
    "serve": (add_serve, "serve a gated model by OpenAI's API, with vLLM or without", SERVE),
    "eval": (
        add_eval,
        "measure heads on your pairs and prompts, or compare whole systems",
        EVAL_EXAMPLES,
    ),
    "info": (add_info, "describe the installation, or a folder of heads", _INFO),
    "bench": (bench.add_arguments, "time the fused step against eager PyTorch", _BENCH),
    "completion": (
        completion.add_completion,
        "print a script that completes commands and options in a shell",
        completion.EXAMPLES,
    ),
    "demo": (add_demo, "sample, train and steer a real model in a few minutes", _DEMO),
}
