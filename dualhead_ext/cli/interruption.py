# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C or SIGTERM during training: the step is finished and a checkpoint is written.

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

_STOPPING = {
    int(signal.SIGINT): b"\nstopping after this step; Ctrl-C again stops at once\n",
    int(signal.SIGTERM): b"\nSIGTERM: stopping after this step\n",
}


class Stopped(Exception):
    """Training ended at a checkpoint because a signal asked for it. exit_code: the command's."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.exit_code = step, 128 + signum


class StopAfterStep(TrainerCallback):
    """After a signal, saves a checkpoint at the end of the step and raises :class:`Stopped`.
    quiet: do not say so.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._asked = 0  # the number of the signal
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals this way within the block. A second signal, or one after the last step, is
        handled as outside the block. But SIGTERM after SIGTERM is ignored: a launcher passes on the
        one that a cluster's scheduler sends to all processes.
        """
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                self._before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._stop_listening()

    def _stop_listening(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = signum
            if not self._quiet:
                os.write(sys.stderr.fileno(), _STOPPING[signum])  # not print, which may be running
        elif not signum == self._asked == signal.SIGTERM and callable(self._before[signum]):
            self._before[signum](signum, frame)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._asked = self._asked_of_any(args)
        if self._asked:
            control.should_save = control.should_training_stop = True
        return control

    def _asked_of_any(self, args: Any) -> int:
        if args.world_size == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=args.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return int(asked)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_listening()  # calibration has no step to finish

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked:
            raise Stopped(state.global_step, self._asked)
