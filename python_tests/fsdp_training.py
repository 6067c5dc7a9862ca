# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_sharding.py: two processes train models that FSDP2 shards.

The subfolder one/rows holds checkpoints of a run in one process.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from fsdp_cases import CASES, launched_with, run
from fsdp_shim import shard_on_cpus
from safetensors.torch import save_file
from torchrun import leave
from trainer_cases import history, same

shard_on_cpus()
folder = Path(sys.argv[1])
main = os.environ["RANK"] == "0"
found = {}


def train(name, case, **changes):
    """The trainer of a case, and copies of its trained tensors.

    The first process also saves them.
    """
    trainer = run(folder / name, case, ddp_backend="gloo", **changes)
    named = trainer.model.named_parameters()
    heads = {n: p.detach().full_tensor() for n, p in named if p.requires_grad}
    if main:
        save_file(heads, folder / f"{name}.safetensors")
    return trainer, heads


first, expected = train("rows", "rows", fsdp=True)
for name in CASES:
    trainer = first if name == "rows" else train(name, name, fsdp=True)[0]
    metrics = trainer.evaluate()
    trainer.save_model()
    found[name] = {
        "shares": {n: list(p.to_local().shape) for n, p in trainer.model.named_parameters()},
        "metrics": metrics,
        "logs": trainer.state.log_history,
        "curve": trainer.model.dual_head_config.kl_curve,
    }

# From here on, the variables of accelerate launch configure FSDP, instead of an argument.
os.environ |= launched_with("fsdp2.yaml")
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
train("cached-memory", "tied", cache_hidden="memory")
train("cached-folder", "tied", cache_hidden=str(folder / "cache"))

try:
    first.model.save_pretrained(folder / "refused")
except ValueError as error:
    found["refused"] = str(error)
if main:
    (folder / "result.json").write_text(json.dumps(found))
first.accelerator.wait_for_everyone()
leave()
