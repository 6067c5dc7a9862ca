# SPDX-License-Identifier: Apache-2.0
"""Run by torchrun in test_hidden_cache.py: two processes build one cache together and read it."""

import json
import sys
from pathlib import Path

from accelerate.utils import gather_object
from tiny_models import make_model
from torchrun import leave
from trainer_cases import heads, history, make_trainer, pairs, same

folder = Path(sys.argv[1])
RUN = {"eval_strategy": "steps", "eval_steps": 2, "ddp_backend": "gloo"}


def make(name, cache=None):
    model = make_model("llama")
    cache = {} if cache is None else {"cache_hidden": str(folder / cache)}
    return make_trainer(folder / name, model, pairs(16), pairs(8, seed=5), **RUN | cache)


def run(name, cache=None):
    """(trainer, how often the backbone ran in this process)."""
    trainer, calls = make(name, cache), []
    trainer.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    return trainer, len(calls)


plain, _ = run("plain")
cached, building = run("cached", "cache")
again, reading = run("again", "cache")
equal = all(
    same(heads(plain.model), heads(other.model)) and history(plain) == history(other)
    for other in (cached, again)
)

broken = make("broken", "broken")
if broken.args.process_index == 1:

    def problem(*args):
        raise RuntimeError("process 1 has a problem")

    broken.model.get_decoder().register_forward_hook(problem)
try:
    broken.train()
    message = None
except RuntimeError as error:
    message = str(error)

main = plain.is_world_process_zero()
result = {
    "equal": gather_object([equal]),
    "calls": [gather_object([building]), gather_object([reading])],
    "problems": gather_object([message])[::-1],
    "left": [path.name for path in (folder / "broken" / "train").iterdir() if path.suffix],
}
if main:
    (folder / "result.json").write_text(json.dumps(result))
plain.accelerator.wait_for_everyone()
leave()
