# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_sharding_copies.py: four processes hold two copies of models that FSDP2
shards over two processes each.

The subfolder one/rows holds checkpoints of a run in one process.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from fsdp_cases import COPIED, launched_with, run
from fsdp_shim import shard_on_cpus
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, Shard
from torchrun import leave
from trainer_cases import history, same

shard_on_cpus()
folder = Path(sys.argv[1])
main = os.environ["RANK"] == "0"
os.environ |= launched_with("hsdp.yaml", processes=4)
found = {}


def train(name, case, **changes):
    """The trainer of a case, and copies of its trained tensors.

    The first process also saves them.
    """
    steps = {"gradient_accumulation_steps": 1}  # one process makes four
    trainer = run(folder / name, case, ddp_backend="gloo", **steps | changes)
    named = trainer.model.named_parameters()
    heads = {n: p.detach().full_tensor() for n, p in named if p.requires_grad}
    if main:
        save_file(heads, folder / f"{name}.safetensors")
    return trainer, heads


first, expected = train("rows", "rows")
for name in COPIED:
    trainer = first if name == "rows" else train(name, name)[0]
    metrics = trainer.evaluate()
    trainer.save_model()
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    kinds = [type(placement) for placement in weight.placements]
    found[name] = {
        "mesh": list(weight.device_mesh.shape),
        "copies_of_shards": kinds == [Replicate, Shard],
        "shares": {n: list(p.to_local().shape) for n, p in trainer.model.named_parameters()},
        "metrics": metrics,
        "logs": trainer.state.log_history,
    }

for name, origin in (("again", "rows"), ("from_one", "one/rows")):
    if main:
        shutil.copytree(folder / origin / "checkpoint-2", folder / name / "checkpoint-2")
    first.accelerator.wait_for_everyone()
    other, heads = train(name, "rows", resume=True)
    found[name] = {
        "same_heads": same(expected, heads),
        "same_history": history(first)[:2] == history(other)[:2],
    }

# The sharded backbone builds a cache of hidden states.
train("cached", "tied", cache_hidden=str(folder / "cache"))

if main:
    (folder / "result.json").write_text(json.dumps(found))
first.accelerator.wait_for_everyone()
leave()
