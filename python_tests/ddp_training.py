# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_trainer.py: two processes train, evaluate, are interrupted and resume."""

import json
import shutil
import sys
from pathlib import Path

from tiny_models import make_model
from torchrun import leave
from trainer_cases import heads, history, make_trainer, pairs, same

folder = Path(sys.argv[1])
RUN = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "ddp_backend": "gloo"}
RUN |= {"optim": "sgd", "max_grad_norm": 0.0}  # with Adam or clipping, a wrong scale would not show


def run(name, resume=False, data=None):
    model = make_model("llama")
    trainer = make_trainer(
        folder / name, model, pairs(16) if data is None else data, pairs(7, seed=5), **RUN
    )
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=resume)
    return trainer, heads(model)


whole, expected = run("whole")
metrics = whole.evaluate()
main = whole.is_world_process_zero()
if main:
    shutil.copytree(folder / "whole" / "checkpoint-3", folder / "again" / "checkpoint-3")
whole.accelerator.wait_for_everyone()
again, resumed = run("again", resume=True)
equal = same(expected, resumed) and history(whole)[:4] == history(again)[:4]
if main:
    result = {
        "find_unused_parameters": whole.model_wrapped.find_unused_parameters,
        "resumed_equal": equal,
        "heads": {name: tensor.tolist() for name, tensor in expected.items()},
        "metrics": metrics,
        "logs": whole.state.log_history,
    }
    (folder / "result.json").write_text(json.dumps(result))
whole.accelerator.wait_for_everyone()
leave()
