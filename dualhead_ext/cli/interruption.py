# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during training: the step is finished and a checkpoint is written.

Of several processes all stop after the same step, whichever got the signal first: one that saved
alone would wait for the others for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

_STOPPING = b"\nstopping after this step; Ctrl-C again stops at once\n"


class Stopped(Exception):
    """Training ended at a checkpoint because the user asked for it."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


class StopAfterStep(TrainerCallback):
    """After a Ctrl-C, saves a checkpoint at the end of the step and raises :class:`Stopped`.
    quiet: do not say that a second Ctrl-C stops at once.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._asked = self._listens = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C this way within the block. A second Ctrl-C, or one after the last step, is
        handled as outside the block.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = signal.signal(signal.SIGINT, self._handle)
        self._listens = True
        try:
            yield
        finally:
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)
            self._listens = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            if not self._quiet:
                os.write(sys.stderr.fileno(), _STOPPING)  # not print, which may be running
        elif callable(self._before):
            self._before(signum, frame)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._asked = self._asked_of_any(args)
        if self._asked:
            control.should_save = control.should_training_stop = True
        return control

    def _asked_of_any(self, args: Any) -> bool:
        if args.world_size == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=args.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_listening()  # calibration has no step to finish

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked:
            raise Stopped(state.global_step)
