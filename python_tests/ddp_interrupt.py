# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_interruption.py: a signal reaches one of two processes."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torchrun import leave

from dualhead_ext.cli.interruption import StopAfterStep, Stopped

dist.init_process_group("gloo")
rank = dist.get_rank()
stop = StopAfterStep(quiet=rank > 0)
args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
told = []
with stop.listening():
    for step in range(3):
        if (step, rank) == (1, 1):
            os.kill(os.getpid(), signal.Signals(int(sys.argv[2])))
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(args, None, control)
        told.append(control.should_save and control.should_training_stop)
    try:
        stop.on_save(args, SimpleNamespace(global_step=3), None)
    except Stopped as stopped:
        told = f"{told} {stopped.exit_code}"
(Path(sys.argv[1]) / f"told-{rank}.txt").write_text(str(told))
leave()
