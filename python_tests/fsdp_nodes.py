# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_nodes.py: one process on each of two nodes, sharded by FSDP2.

FOLDER whole: train to the end. FOLDER lost: the second process is killed after its third step.
FOLDER resumed: continue that run.
"""

import os
import signal
import sys
from pathlib import Path

from fsdp_cases import CASES
from fsdp_shim import shard_on_cpus
from safetensors.torch import save_file
from torchrun import leave
from trainer_cases import make_trainer, pairs
from transformers import TrainerCallback

from dualhead_ext.files.checkpoint import LostProcessError


class EndAfterThreeSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


shard_on_cpus()
folder, part = Path(sys.argv[1]), sys.argv[2]
main = os.environ["RANK"] == "0"
make, options = CASES["rows"]
place = folder / ("whole" if part == "whole" else "lost")
trainer = make_trainer(place, make(), pairs(16), pairs(7, seed=5), **options, ddp_backend="gloo")
if part == "lost":
    trainer.add_callback(EndAfterThreeSteps())
try:
    trainer.train(resume_from_checkpoint=True if part == "resumed" else None)
except LostProcessError as error:
    (folder / "said.txt").write_text(str(error))
    os._exit(1)  # a failure, so that torchrun does not wait for the other node
named = trainer.model.named_parameters()
heads = {name: p.detach().full_tensor() for name, p in named if p.requires_grad}
if main:
    save_file(heads, folder / f"{part}.safetensors")
trainer.accelerator.wait_for_everyone()
leave()
