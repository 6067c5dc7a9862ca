# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, or that runs out of disk space, at random calls that change the disk.

The run is resumed until it ends. It must then have the heads of an uninterrupted run.

test_head_crash, test_checkpoint_crash, test_trainer_checkpoints and test_hidden_cache_build try
every single point of a save.
"""

from __future__ import annotations

import faults

SCRIPT = """
import errno, json, logging, os, random, shutil
from pathlib import Path
import torch
import faults
from tiny_models import make_backbone, make_model
from trainer_cases import heads, make_trainer, same
import dualhead_ext as dh
from dualhead_ext.files.checkpoint import latest_checkpoint

logging.disable()
STEPS = 3
rng = random.Random({seed})

def train(folder):
    latest = latest_checkpoint(folder) if folder.is_dir() else None
    trainer = make_trainer(
        folder, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2,
        cache_hidden=str(folder / "cache"))
    trainer.train(resume_from_checkpoint=True if latest else None)
    trainer.save_model(str(folder / "heads"))

def result(folder):
    model = dh.DualHeadForCausalLM.from_pretrained(
        folder / "heads", backbone=make_backbone("llama"))
    return {{name: p.detach().clone() for name, p in model.lm_head_module.named_parameters()}}

expected_at = Path("expected").resolve()
train(expected_at)
expected, calls = result(expected_at), len(faults.record(lambda folder: None, train))
problems, interrupted = [], 0
for attempt in range({runs}):
    folder, told = Path(f"run-{{attempt}}").resolve(), []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["kill", "kill", "full", "broken"])
        mode, code = faults.KINDS[kind]
        point = rng.randint(1, calls)
        outcome = faults._in_fork(folder, train, mode, point, code)
        told.append(f"{{kind}} at call {{point}}: {{outcome[:200]}}")
        interrupted += outcome != "done"
        if outcome not in ("done", "killed") and "Traceback" in outcome:
            problems.append(f"{{told}}: {{outcome}}")
    outcome = faults._in_fork(folder, train, 0, 0, 0)
    if outcome != "done":
        problems.append(f"{{told}}: cannot go on: {{outcome}}")
        continue
    if not same(expected, result(folder)):
        problems.append(f"{{told}}: other heads")
    kept = sorted(name for name in os.listdir(folder) if "checkpoint" in name)
    if kept != sorted(name for name in os.listdir(expected_at) if "checkpoint" in name):
        problems.append(f"{{told}}: {{kept}}")
    shutil.rmtree(folder)
print(json.dumps({{"problems": problems, "interrupted": interrupted, "calls": calls}}))
"""
RUNS = 2


def test_interrupted_training_ends_as_if_it_had_not_been(tmp_path, seed):
    result = faults.run(SCRIPT.format(seed=seed, runs=RUNS), tmp_path)
    assert not result["problems"], "\n".join(result["problems"])
    assert result["calls"] > 60 and result["interrupted"] >= RUNS / 2
