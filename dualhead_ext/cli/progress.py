# SPDX-License-Identifier: Apache-2.0
"""What training shows while it runs, and how well it ranks pairs that it has not seen."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..data import score_pairs
from ..eval.metrics import wilson_interval
from ..train.trainer import DualHeadTrainer
from .terminal import accuracy_line

# Seconds between two states of a bar: a log file should not grow a line ten times a second.
_TERMINAL_INTERVAL, _FILE_INTERVAL = 0.1, 10.0
# What stands behind the bar: name in a log of training -> shown as.
_SHOWN = {"loss": "loss", "rewards/accuracies": "pairs right", "gate/mean": "alpha"}


class ProgressBars(TrainerCallback):
    """One bar for training and one for each evaluation, on standard error.

    ``started`` is true once training has begun: what fails before is a matter of the arguments.
    """

    def __init__(self) -> None:
        self.started = False
        self._bar: tqdm | None = None

    @classmethod
    def put_on(cls, trainer: DualHeadTrainer) -> ProgressBars:
        """Show these in the place of the trainer's own bars and printed logs."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        bars = cls()
        trainer.add_callback(bars)
        return bars

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = True
        self._open(state, "training", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {text: f"{logs[name]:.3g}" for name, text in _SHOWN.items() if name in logs}
        if self._bar is not None and shown:
            self._bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._bar is None:
            self._open(state, "measuring", len(eval_dataloader))
        if self._bar is not None and self._bar.desc.startswith("measuring"):
            self._bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._bar.desc.startswith("measuring"):
            self._close()

    on_predict = on_evaluate

    def _open(self, state: Any, name: str, total: int, done: int = 0) -> None:
        if state.is_world_process_zero:
            interval = _TERMINAL_INTERVAL if sys.stderr.isatty() else _FILE_INTERVAL
            self._bar = tqdm(desc=name, total=total, initial=done, mininterval=interval)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def held_out_accuracy(trainer: DualHeadTrainer) -> str:
    """Of the trainer's eval_dataset: the share of pairs with log-probability of chosen > rejected,
    summed over each response, under ``softmax(z_RM)`` (or as the preference options of the
    arguments say), with its 95 % Wilson interval, as text.
    """
    rows = trainer.eval_dataset
    ranked = "scores" in rows[0]
    total = sum(len(score_pairs(row["scores"])) for row in rows) if ranked else len(rows)
    correct = round(trainer.evaluate()["eval_rewards/accuracies"] * total)
    return accuracy_line(correct, total, wilson_interval(correct, total))
