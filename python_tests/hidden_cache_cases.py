# SPDX-License-Identifier: Apache-2.0
"""Training runs with and without cached hidden states, and the contents of a cache."""

import json

import torch
from tiny_models import make_model
from trainer_cases import make_trainer, pairs

from dualhead_ext.data.collate import texts_of

RUN = {"eval_strategy": "steps", "eval_steps": 2}


def run(folder, cache=None, model=None, data=None, held_out=None, resume=None, **changes):
    """(trainer, how often the backbone ran)."""
    model = make_model("llama") if model is None else model
    held_out = pairs(7, seed=8) if held_out is None else held_out
    if cache is not None:
        changes["cache_hidden"] = str(cache)
    trainer = make_trainer(folder, model, data, held_out, **RUN | changes)
    calls = []
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    return trainer, len(calls)


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def lengths_of(rows):
    return [tuple(len(tokens) for tokens, _ in texts_of(row)) for row in rows]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix)


def another_weight(model):
    with torch.no_grad():  # changes one value, by one unit in the last place
        weight = model.get_decoder().layers[0].mlp.up_proj.weight[3, 5]
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))


def another_row():
    data = pairs(14)
    data[11]["rejected_ids"][0] += 1
    return data
