# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_streaming.py: two processes train on one stream, and one run resumes."""

import json
import shutil
import sys
from pathlib import Path

from streaming_cases import RUN, Stream
from torchrun import leave
from trainer_cases import heads, history, make_trainer, same

folder = Path(sys.argv[1])


def run(name, resume=False):
    stream = Stream()
    trainer = make_trainer(folder / name, data=stream, ddp_backend="gloo", **RUN)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, heads(trainer.model)


whole, expected = run("whole")
seen = whole.train_dataset.first(6)
main = whole.is_world_process_zero()
if main:
    shutil.copytree(folder / "whole" / "checkpoint-3", folder / "again" / "checkpoint-3")
whole.accelerator.wait_for_everyone()
again, resumed = run("again", resume=True)
assert same(expected, resumed) and history(whole) == history(again)
(folder / f"rows-{whole.args.process_index}.json").write_text(json.dumps(seen))
if main:
    result = {"heads": {name: tensor.tolist() for name, tensor in expected.items()}}
    (folder / "result.json").write_text(json.dumps(result))
whole.accelerator.wait_for_everyone()
leave()
