# SPDX-License-Identifier: Apache-2.0
"""The table of steps: the function that computes each kind of cell."""

from __future__ import annotations

from . import decode_steps, measure_steps, train_steps
from .cells import Step

STEPS: dict[str, Step] = {
    "pretrain": Step(train_steps.pretrain, writes=True, reads=False),
    "train": Step(train_steps.train, writes=True),
    "decode": Step(decode_steps.decode, writes=True),
    "texts": Step(decode_steps.describe_texts),
    "reward": Step(decode_steps.reward),
    "compare": Step(decode_steps.compare),
    "likelihood": Step(measure_steps.likelihood),
    "judge_accuracy": Step(measure_steps.judge_accuracy),
    "answers": Step(measure_steps.answers),
    "gate": Step(measure_steps.gate),
    "cost": Step(measure_steps.cost),
}
