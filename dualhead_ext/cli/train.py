# SPDX-License-Identifier: Apache-2.0
"""``dualhead train``: from a backbone and preference pairs to a folder of heads."""

from __future__ import annotations

import json
import os
import random
import shlex
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DualHeadConfig
from ..data import EMBEDDED, PAIRS, RANKED, PreferenceData, load_preference_data
from ..files.atomic import BusyFolderError
from ..files.checkpoint import SaveError
from ..model.builtin_backbones import BUILTIN_BACKBONES, backbone_path
from ..train.presets import PRESETS, head_of
from .errors import UserError, argument, one_line
from .models import check_backbone, check_device, loading, quiet_transformers

if TYPE_CHECKING:
    from ..train.trainer import DualHeadTrainer, DualHeadTrainingArguments

# Fields of DualHeadTrainingArguments that have an option of their own: type, other names, help.
TRAINING_OPTIONS: dict[str, tuple[type, tuple[str, ...], str]] = {
    "learning_rate": (float, (), "of AdamW"),
    "gate_learning_rate": (float, (), "of the gate, if another"),
    "num_train_epochs": (float, ("--epochs",), "times through the rows"),
    "max_steps": (int, (), "optimizer steps, instead of epochs"),
    "per_device_train_batch_size": (int, ("--batch-size",), "rows per forward pass"),
    "gradient_accumulation_steps": (int, ("--accumulate",), "forward passes per step"),
    "warmup_steps": (float, (), "steps, or a share of all if below 1"),
    "max_length": (int, (), "tokens per text"),
    "preference": (str, (), "token_reward, or log_prob as the paper"),
    "pref_gate": (int, (), "1: alpha weighs token rewards; 0: it does not"),
    "kl_price": (float, (), "of a nat between mixture and backbone, per token"),
    "beta_r": (float, (), "scales the preference margin"),
    "lambda_r": (float, (), "weight of the preference term"),
    "lambda_g": (float, (), "weight of the gate's regulariser"),
    "gate_regularizer": (str, (), "entropy, entropy_as_printed or none"),
    "lm_reduction": (str, (), "sum or mean"),
    "pref_on": (str, (), "reward or mixed"),
    "pref_reduction": (str, (), "sum or mean"),
    "gamma": (float, (), "target margin"),
    "label_smoothing": (float, (), "share of pairs labelled the wrong way round"),
    "logging_steps": (float, (), "steps between logs"),
    "save_steps": (float, (), "steps between checkpoints"),
    "save_total_limit": (int, (), "checkpoints to keep"),
    "early_stopping_patience": (int, (), "epochs without a better held-out loss before it stops"),
    "seed": (int, (), "of everything random"),
    "cache_hidden": (
        str,
        (),
        "where the backbone's hidden states are kept: auto, memory, a folder, or none",
    ),
    "cache_hidden_dtype": (str, (), "auto (nothing changes) or bfloat16 (half of float32's size)"),
}


def training_defaults() -> dict[str, Any]:
    """Default of each of `TRAINING_OPTIONS`; asks transformers, so only for ``train --help``."""
    with argument():
        from ..train.trainer import DualHeadTrainingArguments
    known = {f.name: f.default for f in fields(DualHeadTrainingArguments)}
    known |= PRESETS["default"]["training"]
    return {name: known[name] for name in TRAINING_OPTIONS}


def train(arguments: Namespace) -> None:
    """Train, measure on held-out pairs, save."""
    # What needs no torch comes first: a mistyped path should not take seconds to be found.
    _check_output(arguments)
    check_backbone("--backbone", arguments.backbone)
    rows, held_out = _load_pairs(arguments)
    with argument():
        quiet_transformers(arguments.backbone)
        from .progress import ProgressBars, held_out_accuracy
    check_device(arguments.device)
    trainer = _make_trainer(arguments, rows, held_out)
    unit = RANKED if "responses" in rows[0] else PAIRS
    print(f"{len(rows)} {unit} to train on, {len(held_out)} held out", flush=True)
    if trainer.args.cache_hidden is not None:
        print("the backbone reads them once", flush=True)
        with argument("--cache-hidden"):
            trainer.cache_hidden()
    with argument("--output"):
        trainer.try_saving()
    bars = ProgressBars.put_on(trainer)
    before = held_out_accuracy(trainer) if held_out else None
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(arguments))
    except (BusyFolderError, SaveError) as error:
        raise UserError(f"--output: {one_line(error)}") from error
    except (ValueError, OSError) as error:
        if bars.started or not arguments.resume:
            raise
        raise UserError(f"--resume: {one_line(error)}") from error
    with argument("--output"):
        trainer.save_model()
    if held_out:
        _report(before, held_out_accuracy(trainer), held_out)
    print(f"\nheads saved in {arguments.output}; to decode with them:")
    print(f"  {_generate_command(arguments)}")


def _generate_command(arguments: Namespace) -> str:
    """What decodes with the heads: a backbone that is a folder of the user's has to be named."""
    words = ["dualhead", "generate", arguments.output, "How are you?", "--show-gate"]
    if arguments.backbone not in BUILTIN_BACKBONES and os.path.exists(arguments.backbone):
        words += ["--backbone", arguments.backbone]
    return shlex.join(words)


def _check_output(arguments: Namespace) -> None:
    """Refuse an output folder that cannot be used. Makes none: what fails before training leaves
    nothing behind.
    """
    from ..files.checkpoint import latest_checkpoint

    folder = Path(arguments.output)
    with argument("--output"):
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"expected a folder, got {folder}: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"expected a folder to write to, got {folder}: not permitted")
    with argument("--resume"):
        if arguments.resume == "last" and latest_checkpoint(folder) is None:
            raise ValueError(f"expected a whole checkpoint in {folder}, found none")
    if arguments.resume or arguments.overwrite or not folder.exists():
        return
    with argument("--output"):
        found = next((p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")), None)
        if found is not None:
            raise ValueError(
                f"expected an empty or new folder, got {folder}, which holds {found}; "
                "go on with --resume or write into it with --overwrite"
            )


def _load_pairs(arguments: Namespace) -> tuple[list[dict], list[dict]]:
    """(to train on, held out)."""
    with argument("--data"):
        rows: Any = load_preference_data(arguments.data, arguments.split)
    held_out: Any = []
    if arguments.eval_data is not None:
        with argument("--eval-data"):
            held_out = load_preference_data(arguments.eval_data)
    elif (
        arguments.data == EMBEDDED
        and arguments.split in (None, "train")
        and arguments.eval_share > 0
    ):
        held_out = load_preference_data(EMBEDDED, "test")
    elif arguments.eval_share > 0:
        rows, held_out = hold_out(rows, arguments.eval_share)
    # A small run should not spend its time on measuring.
    rows, held_out = rows[: arguments.limit], held_out[: arguments.limit]
    if not rows:
        raise UserError(
            f"--eval-share: expected a share that leaves pairs to train on, got "
            f"{arguments.eval_share:g} of {len(held_out)} pairs"
        )
    highest = max(row.get("objective", 0) for row in [*rows, *held_out])
    if highest >= arguments.num_objectives:
        raise UserError(
            f"--num-objectives: expected at least {highest + 1}, since the data have pairs of "
            f"objective {highest}, got {arguments.num_objectives}"
        )
    return list(rows), list(held_out)


def hold_out(rows: PreferenceData, share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Split rows into (the others, about ``share`` of them), pairs of one prompt on one side."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    held_out: list[dict] = []
    wanted = max(1, round(share * len(rows)))
    chosen = set()
    for prompt in order:
        if len(held_out) >= wanted:
            break
        held_out += groups[prompt]
        chosen.add(prompt)
    return [row for row in rows if json.dumps(row["prompt"]) not in chosen], held_out


def _make_trainer(arguments: Namespace, rows: list[dict], held_out: list[dict]) -> DualHeadTrainer:
    import torch
    from transformers import AutoTokenizer

    from ..model.causal_lm import DualHeadForCausalLM
    from ..train.trainer import DualHeadTrainer

    training = _training_arguments(arguments)
    torch.manual_seed(training.seed)  # the gate's first weights
    with loading("--backbone", arguments.backbone):
        path = backbone_path(arguments.backbone)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # A CPU computes bf16 slowly, and small backbones are the ones that it trains.
        dtype = torch.float32 if training.device.type == "cpu" else None
        names = {f.name for f in fields(DualHeadConfig)} - {"preference", "kl_curve"}
        given = {name: getattr(arguments, name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        head = head_of(arguments.preset, given)
        model = DualHeadForCausalLM.from_backbone(path, dtype=dtype, **head)
    with argument():
        return DualHeadTrainer(
            model,
            training,
            train_dataset=rows,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
        )


def _training_arguments(arguments: Namespace) -> DualHeadTrainingArguments:
    from ..train.trainer import DualHeadTrainingArguments

    given = {
        n: getattr(arguments, n) for n in TRAINING_OPTIONS if getattr(arguments, n) is not None
    }
    known = {f.name for f in fields(DualHeadTrainingArguments) if f.init}
    for name, text in arguments.set:
        if name not in known:
            raise UserError(f"--set: expected a field of DualHeadTrainingArguments, got {name!r}")
        try:
            given[name] = json.loads(text)
        except ValueError:
            given[name] = text
    if arguments.device == "cpu":
        given["use_cpu"] = True
    ours = {"output_dir": arguments.output, "report_to": "none", "dataloader_pin_memory": False}
    ours["preset"] = arguments.preset
    try:
        with argument():
            training = DualHeadTrainingArguments(**{**ours, **given})
    except TypeError as error:
        raise UserError(one_line(error)) from error
    _check_reporters(training.report_to)
    return training


def _check_reporters(names: list[str]) -> None:
    """Refuse reporters that are not installed, which the trainer would find out late."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise UserError(
                f"--set report_to: {name} is not installed; there are "
                f"{', '.join(sorted(available)) or 'none'}"
            )


def _checkpoint(arguments: Namespace) -> str | bool | None:
    return True if arguments.resume == "last" else arguments.resume


def _report(before: str, after: str, held_out: list[dict]) -> None:
    from ..eval.metrics import longer_is_better
    from .terminal import percent

    longer, _ = longer_is_better(held_out)
    print("\npreference accuracy of the reward head on held-out pairs")
    print(f"  before                  {before}")
    print(f"  after                   {after}")
    print(f"  always the longer one   {percent(longer)}")
