# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_interruption.py: Ctrl-C reaches one of two processes."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torchrun import leave

from dualhead_ext.cli.interruption import StopAfterStep

dist.init_process_group("gloo")
rank = dist.get_rank()
stop = StopAfterStep(quiet=rank > 0)
args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
told = []
with stop.listening():
    for step in range(3):
        if (step, rank) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(args, None, control)
        told.append(control.should_save and control.should_training_stop)
(Path(sys.argv[1]) / f"told-{rank}.txt").write_text(str(told))
leave()
