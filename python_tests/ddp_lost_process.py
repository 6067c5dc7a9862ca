# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_engines.py: one of two processes ends in the middle of a run."""

import os
import sys
from pathlib import Path

from torchrun import leave
from trainer_cases import make_trainer, pairs
from transformers import TrainerCallback

from dualhead_ext.files.checkpoint import LostProcessError

folder = Path(sys.argv[1])


class EndAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os._exit(0)  # torchrun sees a successful exit and does not end the other process


trainer = make_trainer(
    folder / "run", data=pairs(32), save_strategy="steps", save_steps=2, ddp_backend="gloo"
)
trainer.add_callback(EndAfter())
try:
    trainer.train()
except LostProcessError as error:
    (folder / "said.txt").write_text(str(error))
leave()
