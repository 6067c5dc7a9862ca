# SPDX-License-Identifier: Apache-2.0
"""Open prompts that come with the package. Each combines a task with an everyday topic, in a
neutral tone, so an answer may be positive or negative, long or short, simple or scholarly.

Each topic is in one split only. So the prompts for training, for tuning strengths and for measuring
share neither a prompt nor a topic.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

# The topics of each split, in the order of the file; each topic gets four tasks.
_TOPICS = {"train": range(0, 52), "calibration": range(52, 68), "measure": range(68, 120)}
_TASKS_PER_TOPIC = 4
SPLITS = tuple(_TOPICS)


@cache
def _parts() -> tuple[list[str], list[str]]:
    path = Path(__file__).parent.parent / "data" / "samples" / "open-prompts.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    return parts["templates"], parts["topics"]


def open_prompts(split: str) -> list[str]:
    """The prompts of a split in a fixed random order, so that the first n are a fair sample.

    Args:
        split: "train" (208 prompts), "calibration" (64) or "measure" (208).
    Raises:
        ValueError: another split.
    """
    if split not in _TOPICS:
        raise ValueError(f"open_prompts: split must be one of {', '.join(SPLITS)}, got {split!r}")
    tasks, topics = _parts()
    prompts = [
        tasks[(index * _TASKS_PER_TOPIC + k + index // 3) % len(tasks)].format(topics[index])
        for index in _TOPICS[split]
        for k in range(_TASKS_PER_TOPIC)
    ]
    random.Random(split).shuffle(prompts)
    return prompts
