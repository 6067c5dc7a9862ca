# SPDX-License-Identifier: Apache-2.0
"""Output during training: a line for each log and a progress bar below."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from ..train.trainer import DualHeadTrainer

# Seconds between updates of a bar: on a terminal, and in a log file, where each one is a line.
_TERMINAL_INTERVAL, _FILE_INTERVAL = 0.1, 10.0
# The contents of a log line: name in the trainer's log -> format. Reporters get the whole log.
_SHOWN = {
    "loss": "loss {:<7.4g}",
    "rewards/accuracies": "pairs right {:<7.1%}",
    "gate/mean": "alpha {:<6.3f}",
    "kl": "KL {:<8.3g}",
}


def only_ties(logs: dict[str, float], prefix: str = "") -> bool:
    """Whether all rewards in a log are zero, so that its accuracy is meaningless: the heads have
    not learnt anything yet.
    """
    return logs.get(f"{prefix}rewards/chosen") == logs.get(f"{prefix}rewards/rejected") == 0


def log_line(logs: dict[str, float], step: int, max_steps: int) -> str:
    """A line such as ``step 10/250  epoch 0.40  loss 0.693  pairs right 52.0%  alpha 0.500``; for
    an evaluation "held out" replaces the step.
    """
    prefix = "eval_" if "eval_loss" in logs else ""
    start = f"step {step:>{len(str(max_steps))}}/{max_steps}  epoch {logs.get('epoch', 0):<5.2f}"
    if prefix:
        start = "held out".ljust(len(start))
    shown = [
        f"{'pairs right':11} {'ties':7}"
        if name == "rewards/accuracies" and only_ties(logs, prefix)
        else form.format(logs[prefix + name])
        for name, form in _SHOWN.items()
        if prefix + name in logs
    ]
    return "  ".join([start, *shown]).rstrip()


class ProgressBars(TrainerCallback):
    """One bar for training and one for each evaluation, on standard error; a line for each log of
    training, on standard output.

    ``started`` is True once training has begun. Earlier failures are caused by the arguments.
    """

    def __init__(self) -> None:
        self.started = False
        self._bar: tqdm | None = None

    @classmethod
    def put_on(cls, trainer: DualHeadTrainer) -> ProgressBars:
        """Replace the trainer's own bars and printed logs."""
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
        if self._trains() and ("loss" in logs or "eval_loss" in logs):
            self._bar.write(log_line(logs, state.global_step, state.max_steps))
            sys.stdout.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if args.calibrate and state.is_world_process_zero:
            print("calibrating the strength: the model writes some replies", flush=True)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._bar is None:
            self._open(state, "measuring", len(eval_dataloader))
        if self._bar is not None and not self._trains():
            self._bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._trains():
            self.close()

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.on_evaluate(args, state, control)

    def close(self) -> None:
        """Close the bar. Its last state stays on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _trains(self) -> bool:
        return self._bar is not None and self._bar.desc.startswith("training")

    def _open(self, state: Any, name: str, total: int, done: int = 0) -> None:
        if state.is_world_process_zero:
            interval = _TERMINAL_INTERVAL if sys.stderr.isatty() else _FILE_INTERVAL
            self._bar = tqdm(desc=name, total=total, initial=done, mininterval=interval)
