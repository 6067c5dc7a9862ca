# SPDX-License-Identifier: Apache-2.0
"""``dualhead train``: train heads for a backbone on preference data, and save them in a folder."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..config import DualHeadConfig
from ..data import PAIRS, RANKED
from ..files.checkpoint import LostProcessError, SaveError
from ..model.builtin_backbones import BUILTIN_BACKBONES, backbone_path
from ..train.presets import head_of
from . import training_data
from .errors import UserError, argument, one_line
from .models import check_backbone, check_device, loading, quiet_transformers
from .training_options import TRAINING_OPTIONS

if TYPE_CHECKING:
    from ..train.trainer import DualHeadTrainer, DualHeadTrainingArguments


def train(arguments: Namespace) -> int | None:
    """Train, measure on held-out rows, save, and print a summary; see :func:`_train`. Of several
    processes only the first one prints.
    """
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if _quiet() else sys.stdout):
            return _train(arguments)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM, whose exit code follows from it
        _say(_after_interrupt(arguments))
        raise


def _train(arguments: Namespace) -> int | None:
    # Checks without torch come first, so that a mistyped path is reported at once.
    _check_output(arguments)
    check_backbone("--backbone", arguments.backbone)
    # rows: those that are shown and measured on. data: those that are trained on.
    data, rows, held_out = (training_data.stream if arguments.streaming else training_data.load)(
        arguments
    )
    with argument(extra="smollm2" if arguments.backbone == "smollm2" else "train"):
        quiet_transformers(arguments.backbone)
        from . import training_summary  # noqa: F401  names the extra that is missing
    from ..train.hidden_cache import UnusableCacheError

    check_device(arguments.device)
    trainer = _make_trainer(arguments, data, held_out)
    with ExitStack() as held:
        with argument("--output"):
            held.enter_context(trainer.holding_output())
        _check_unused(arguments)  # another run may have ended meanwhile
        try:
            return _train_and_save(arguments, trainer, rows, held_out)
        except UnusableCacheError as error:  # a shard is checked when it is first read
            raise UserError(f"--cache-hidden: {one_line(error)}") from error


def _train_and_save(
    arguments: Namespace, trainer: DualHeadTrainer, rows: list[dict], held_out: list[dict]
) -> int | None:
    from ..data.rendering import is_raw
    from . import training_files
    from . import training_summary as summary
    from .interruption import StopAfterStep, Stopped
    from .progress import ProgressBars

    amount = RANKED if "responses" in rows[0] else PAIRS
    amount = f"a stream of {amount}" if arguments.streaming else f"{len(rows)} {amount}"
    print(f"{amount} to train on, {len(held_out)} held out", flush=True)
    if is_raw(rows[0]["prompt"], trainer.processing_class):
        print(
            "the prompts are plain text and are trained on without the backbone's chat template, "
            "which chat and generate use; to train with it, give prompts and responses as "
            'messages: [{"role": "user", "content": "..."}]',
            flush=True,
        )
    if trainer.args.cache_hidden is not None:
        if not arguments.streaming:
            print("the backbone's hidden states are computed once", flush=True)
        with argument("--cache-hidden"):
            trainer.cache_hidden()
    with argument("--output"):
        trainer.try_saving()
    bars, stop = ProgressBars.put_on(trainer), StopAfterStep(quiet=_quiet())
    trainer.add_callback(stop)
    before = summary.measure(trainer)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=_checkpoint(arguments))
    except Stopped as stopped:
        bars.close()
        _say(f"stopped at step {stopped.step}; {_how_to_resume(arguments)}")
        return stopped.exit_code
    except SaveError as error:
        raise UserError(f"--output: {one_line(error)}") from error
    except LostProcessError as error:
        raise UserError(one_line(error)) from error
    except (ValueError, OSError) as error:
        if str(error).startswith("calibrate: no scale"):
            raise UserError(
                f"the reward head has learnt nothing, so no heads are saved ({one_line(error)}); "
                "try more --epochs or a larger --learning-rate"
            ) from error
        if bars.started or not arguments.resume:
            raise
        raise UserError(f"--resume: {one_line(error)}") from error
    with argument("--output"):
        trainer.save_model()
    history = list(trainer.state.log_history)  # before the calibrated heads are measured
    after = summary.measure(trainer)
    summary.print_figures(before, after, held_out)
    replies = summary.sample_before_and_after(
        trainer.model, trainer.processing_class, [*held_out, *rows], trainer.args.seed
    )
    summary.print_replies(replies)
    rate = trainer.args.gate_learning_rate or trainer.args.learning_rate
    config = trainer.model.dual_head_config
    for warning in summary.warnings_of(after, replies, config, rate):
        print(f"\nNote: {warning}.")
    with argument("--output"):
        curves = ""
        if trainer.is_world_process_zero():
            training_files.write_card(arguments, trainer, amount, held_out, after)
            curves = training_files.write_plot(
                arguments.output, history, trainer.state.global_step, before, after
            )
    print(f"\nheads saved in {arguments.output}{curves}")
    print(f"to decode with them:\n  {_generate_command(arguments)}")
    return None


def resuming_command(argv: Sequence[str]) -> str:
    """The command line that resumes ``dualhead train`` with the arguments ``argv``."""
    words, skip = [], False
    for i, word in enumerate(argv):
        if skip:
            skip = False
        elif word == "--resume":  # its value, if it has one
            skip = i + 1 < len(argv) and not argv[i + 1].startswith("-")
        elif word != "--overwrite" and not word.startswith("--resume="):
            words.append(word)
    return shlex.join(["dualhead", *words, "--resume"])


def _after_interrupt(arguments: Namespace) -> str:
    """The message after a signal that did not wait for a checkpoint."""
    from ..files.checkpoint import latest_checkpoint

    folder = Path(arguments.output)
    last = latest_checkpoint(folder) if folder.is_dir() else None
    if last is None:
        return "stopped before the first checkpoint; there is nothing to resume"
    return f"stopped; {last} is complete; {_how_to_resume(arguments)}"


def _how_to_resume(arguments: Namespace) -> str:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return "to resume, start the processes as before, with --resume"
    return f"to resume: {resuming_command(arguments.argv)}"


def _say(message: str) -> None:
    if not _quiet():
        print(f"\n{message}", file=sys.stderr)


def _quiet() -> bool:
    """Whether a launcher started this process, and not as the first one."""
    return int(os.environ.get("RANK") or 0) > 0


def _generate_command(arguments: Namespace) -> str:
    """The command that decodes with the heads. A backbone in a local folder must be named."""
    words = ["dualhead", "generate", arguments.output, "How are you?", "--show-gate"]
    if arguments.backbone not in BUILTIN_BACKBONES and os.path.exists(arguments.backbone):
        words += ["--backbone", arguments.backbone]
    return shlex.join(words)


def _check_output(arguments: Namespace) -> None:
    """Raise UserError if the output folder cannot be used. It is not created here, so a failure
    before training leaves nothing behind.
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
            raise ValueError(f"expected a complete checkpoint in {folder}, found none")
    _check_unused(arguments)


def _check_unused(arguments: Namespace) -> None:
    """Raise UserError if the output folder has files that only ``--overwrite`` may replace."""
    folder = Path(arguments.output)
    if arguments.resume or arguments.overwrite or not folder.exists():
        return
    with argument("--output"):
        found = next((p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")), None)
        if found is not None:
            raise ValueError(
                f"expected an empty or new folder, got {folder}, which holds {found}; "
                "continue a run with --resume, or replace the heads with --overwrite"
            )


def _make_trainer(arguments: Namespace, rows: Any, held_out: list[dict]) -> DualHeadTrainer:
    import torch
    from transformers import AutoTokenizer

    from ..model.causal_lm import DualHeadForCausalLM
    from ..train.trainer import DualHeadTrainer

    training = _training_arguments(arguments)
    torch.manual_seed(training.seed)  # the gate's first weights
    with loading("--backbone", arguments.backbone):
        path = backbone_path(arguments.backbone)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # CPUs compute bf16 slowly, and backbones trained on a CPU are small.
        dtype = torch.float32 if training.device.type == "cpu" else None
        names = {f.name for f in fields(DualHeadConfig)} - {"preference", "kl_curve"}
        given = {name: getattr(arguments, name, None) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        head = head_of(arguments.preset, given)
        model = DualHeadForCausalLM.from_backbone(path, dtype=dtype, **head)
    try:
        with argument():
            return DualHeadTrainer(
                model,
                training,
                train_dataset=rows,
                eval_dataset=held_out or None,
                processing_class=tokenizer,
            )
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it makes the folder
            raise UserError(f"--output: {error}") from error.__cause__
        raise


def _training_arguments(arguments: Namespace) -> DualHeadTrainingArguments:
    import torch

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
        except (ValueError, RecursionError):
            given[name] = text
    # Without an accelerator, accelerate joins torchrun's processes only with use_cpu.
    if arguments.device == "cpu" or not torch.accelerator.is_available():
        given["use_cpu"] = True
    ours = {"output_dir": arguments.output, "report_to": "none", "dataloader_pin_memory": False}
    ours |= {"preset": arguments.preset, "log_kl": True}
    if isinstance(given.get("report_to"), str):
        given["report_to"] = [name.strip() for name in given["report_to"].split(",")]
    try:
        with argument():
            training = DualHeadTrainingArguments(**{**ours, **given})
    except TypeError as error:
        raise UserError(one_line(error)) from error
    _check_reporters(cast("list[str]", training.report_to))  # a list once it is constructed
    return training


def _check_reporters(names: list[str]) -> None:
    """Raise UserError for reporters that are not installed; the trainer would notice late."""
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise UserError(
                f"--report-to: {name} is not installed; installed are: "
                f"{', '.join(sorted(available)) or 'none'}"
            )


def _checkpoint(arguments: Namespace) -> str | bool | None:
    return True if arguments.resume == "last" else arguments.resume
