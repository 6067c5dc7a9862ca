# SPDX-License-Identifier: Apache-2.0
"""Tiny training runs: tokenised pairs that can be learnt, and trainers for them."""

import torch
from tiny_models import VOCAB, make_model

import dualhead_ext as dh

# Chosen responses use tokens of the first range, rejected ones of the second.
CHOSEN, REJECTED = (3, 9), (60, 66)


def pairs(count, seed=0, objectives=1):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high, shortest, longest):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return torch.randint(low, high, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": tokens(3, VOCAB, 2, 5),
            "chosen_ids": tokens(*CHOSEN, 1, 6),
            "rejected_ids": tokens(*REJECTED, 1, 6),
            "objective": i % objectives,
        }
        for i in range(count)
    ]


def ranked_lists(count=10, seed=0, objectives=1):
    """Ranked lists of 2 to 4 responses, scored by their share of chosen tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        prompt = torch.randint(3, VOCAB, (3,), generator=generator).tolist()
        texts, scores = [], []
        for good in range(int(torch.randint(2, 5, (1,), generator=generator))):
            ids = [torch.randint(*CHOSEN, (good,), generator=generator)]
            ids.append(torch.randint(*REJECTED, (4 - good,), generator=generator))
            texts.append(torch.cat(ids).tolist())
            scores.append(good / 4)
        rows.append(
            {
                "response_input_ids": [prompt + text for text in texts],
                "response_completion_mask": [[0] * 3 + [1] * len(text) for text in texts],
                "scores": scores,
                "objective": i % objectives,
            }
        )
    return rows


def arguments(folder, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "preset": "paper",
        "cache_hidden": None,
    }
    return dh.DualHeadTrainingArguments(**options | changes)


def make_trainer(folder, model=None, data=None, eval_data=None, config=None, **changes):
    model = make_model("llama", **(config or {})) if model is None else model
    return dh.DualHeadTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=pairs(14) if data is None else data,
        eval_dataset=eval_data,
    )


def heads(model):
    """Copies of the trained tensors."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(trainer):
    """The bits of every logged number, except for times."""
    clock = ("runtime", "per_second", "train_loss", "total_flos")
    return [
        {k: float(v).hex() for k, v in entry.items() if not any(word in k for word in clock)}
        for entry in trainer.state.log_history
    ]
