# SPDX-License-Identifier: Apache-2.0
"""Code shared by the trainings: loading, arguments, adapters, and running a trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from .settings import TrainSettings
from .trained import (
    bars,
    check_finite,
    check_log,
    finite_logs,
    new_folder,
    weights_digest,
    write_record,
)

Pairs = list[dict[str, Any]]


def load_tokenizer(backbone: Path) -> Any:
    """A backbone's tokenizer, with a padding token other than its end token, because a classifier
    reads its score at the last token that is not padding. Without a padding token, BOS is used.

    Raises:
        ValueError: no padding token and no BOS either.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if tokenizer.bos_token is None or tokenizer.bos_token_id == tokenizer.eos_token_id:
            raise ValueError(
                f"load_tokenizer: the tokenizer in {backbone} must have a padding token other than "
                f"its end token, got {tokenizer.pad_token!r}"
            )
        tokenizer.pad_token = tokenizer.bos_token
    return tokenizer


class StopOnNonFinite(TrainerCallback):
    """Raises FloatingPointError as soon as a logged loss or gradient norm is not finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        check_log((logs or {}) | {"step": state.global_step})


class Bar(ProgressCallback):
    """transformers' progress bar, which shows the loss instead of printing a line per log entry."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}")


def run(
    method: str,
    build: Callable[[dict[str, Any]], Any],
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    progress: bool,
    options: dict[str, Any],
) -> Path:
    """Build a trainer, train, write weights, tokenizer and record.

    Args:
        method: a name from `training.TRAINERS`.
        build: makes a trainer from transformers' arguments; called after the seed is set.
        options: the method's own options, for the record.
    """
    name = f"train_{method}"
    if not pairs:
        raise ValueError(f"{name}: pairs must hold at least one, got none")
    started = time.monotonic()
    with new_folder(out) as folder, bars(progress):
        set_seed(settings.seed)  # fresh weights: gate, adapter, score
        trainer = build(training_arguments(settings, folder, progress))
        trainer.add_callback(StopOnNonFinite())
        trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
        if progress:
            trainer.add_callback(Bar())
        trainer.train()
        model = trainer.model
        check_finite(model, name)
        for config in getattr(model, "peft_config", {}).values():
            config.base_model_name_or_path = ""  # a local path is useless on other machines
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's file also contains that path
        trainer.processing_class.save_pretrained(folder)
        write_record(
            folder,
            {
                "method": method,
                "backbone_sha256": weights_digest(backbone),
                "settings": settings.to_dict(),
                "options": options,
                "pairs": len(pairs),
                "steps": trainer.state.global_step,
                "trained_parameters": _count(model, trained=True),
                "parameters": _count(model),
                "seconds": round(time.monotonic() - started, 2),
                "logs": finite_logs(trainer.state.log_history),
            },
        )
    return Path(out)


def training_arguments(settings: TrainSettings, folder: Path, progress: bool) -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments. No checkpoints, which would be pickled."""
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.pairs_at_once,
        "gradient_accumulation_steps": settings.batch_size // settings.pairs_at_once,
        "max_length": settings.max_length,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": settings.scheduler,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.bf16,
        "use_cpu": not torch.cuda.is_available(),  # otherwise bf16 is refused
        "save_strategy": "no",
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def adapter(settings: TrainSettings, task: str, **others: Any) -> Any:
    """PEFT's configuration, or None for all weights."""
    if not settings.lora:
        return None
    from peft import LoraConfig

    targets = settings.lora_targets
    return LoraConfig(
        task_type=task,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        **others,
    )


def _count(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
