# SPDX-License-Identifier: Apache-2.0
"""The options of ``dualhead train`` that are fields of DualHeadTrainingArguments. Imports neither
torch nor transformers: ``dualhead train --help`` is instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..train.presets import PRESETS
from .argument_types import MAX_SEED, key_value, number

# Fields of DualHeadTrainingArguments with their own option: (type, other names, help).
TRAINING_OPTIONS: dict[str, tuple[type, tuple[str, ...], str]] = {
    "learning_rate": (float, (), "learning rate of the reward head, for AdamW"),
    "gate_learning_rate": (float, (), "learning rate of the gate, if it differs"),
    "num_train_epochs": (float, ("--epochs",), "passes over the rows"),
    "max_steps": (int, (), "number of optimizer steps, instead of epochs"),
    "per_device_train_batch_size": (int, ("--batch-size",), "rows per forward pass"),
    "gradient_accumulation_steps": (int, ("--accumulate",), "forward passes per step"),
    "warmup_steps": (float, (), "warm-up steps, or their share of all steps if below 1"),
    "max_length": (int, (), "a longer text is cut to this many tokens"),
    "preference": (str, (), "the reward of a response: token_reward, or log_prob as in the paper"),
    "pref_gate": (int, (), "1: token rewards are weighted by alpha; 0: they are not"),
    "kl_price": (float, (), "weight of the KL divergence from the backbone, per token"),
    "reward_l2": (
        float,
        (),
        "weight of the mean squared token reward; take 0 with a trainable gate",
    ),
    "beta_r": (float, (), "factor of the preference margin"),
    "lambda_r": (float, (), "weight of the preference term"),
    "lambda_g": (float, (), "weight of the gate's regulariser"),
    "gate_regularizer": (str, (), "entropy, entropy_as_printed (the paper's sign) or none"),
    "lm_reduction": (str, (), "the language-model loss of a response: sum or mean"),
    "pref_on": (str, (), "distribution of the preference loss: reward or mixed"),
    "pref_reduction": (str, (), "log-probabilities of a response: sum or mean"),
    "gamma": (float, (), "margin that the better response should win by"),
    "label_smoothing": (float, (), "assumed share of pairs with the wrong label"),
    "logging_steps": (float, (), "steps between logs, or their share of all steps if below 1"),
    "save_steps": (float, (), "steps between checkpoints"),
    "save_total_limit": (int, (), "checkpoints to keep"),
    "early_stopping_patience": (
        int,
        (),
        "stop after this many epochs without a better held-out loss",
    ),
    "seed": (int, (), "seed of all random numbers"),
    "report_to": (str, (), "reporters, such as tensorboard or wandb, separated by commas"),
    "cache_hidden": (
        str,
        (),
        "where to keep the backbone's hidden states: auto, memory, a folder, or none",
    ),
    "cache_hidden_dtype": (
        str,
        (),
        "auto (as the backbone computes them) or bfloat16 (half the size of float32)",
    ),
}

# Defaults, for the help, of options that no preset sets and that are not None. A test compares them
# with those of the arguments, whose module imports transformers.
_DEFAULTS: dict[str, Any] = {
    "max_steps": -1,
    "warmup_steps": 0,
    "max_length": 512,
    "kl_price": 0.0,
    "lambda_r": 1.0,
    "lm_reduction": "sum",
    "pref_on": "reward",
    "pref_reduction": "sum",
    "gamma": 0.0,
    "label_smoothing": 0.0,
    "logging_steps": 0.025,
    "save_steps": 500,
    "seed": 42,
    "report_to": "none",
    "cache_hidden": "auto",
    "cache_hidden_dtype": "auto",
}


def help_defaults() -> dict[str, Any]:
    """The default of each of `TRAINING_OPTIONS` with the default preset."""
    known = _DEFAULTS | PRESETS["default"]["training"]
    return {name: known.get(name) for name in TRAINING_OPTIONS}


def add_training(parser: argparse.ArgumentParser) -> None:
    """Declare these options. They have no argparse default, since the preset decides."""
    training = parser.add_argument_group("training")
    defaults = help_defaults()
    for name, (kind, short, text) in TRAINING_OPTIONS.items():
        names = [f"--{name.replace('_', '-')}", *short]
        parse: Callable[[str], Any] = str if kind is str else number(kind)
        if name == "seed":
            parse = number(int, 0, MAX_SEED)
        if defaults[name] is not None:
            text = f"{text} (default {defaults[name]})"
        training.add_argument(*names, dest=name, type=parse, metavar="X", help=text)
    training.add_argument(
        "--set",
        action="append",
        default=[],
        type=key_value,
        metavar="NAME=VALUE",
        help="any other field of DualHeadTrainingArguments",
    )
