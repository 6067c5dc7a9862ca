# SPDX-License-Identifier: Apache-2.0
"""Open prompts that come with the package: a task and an everyday topic, neutral in tone, so that
an answer may be positive or negative, long or short, plain or learned.

A topic is in one split only. So the prompts that heads train on, those that strengths are tuned on
and those that systems are measured on have neither a prompt nor a topic in common.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

# Topics of each split, in the order of the file; four of the tasks for each topic.
_TOPICS = {"train": range(0, 52), "calibration": range(52, 68), "measure": range(68, 120)}
_TASKS_PER_TOPIC = 4
SPLITS = tuple(_TOPICS)


@cache
def _parts() -> tuple[list[str], list[str]]:
    path = Path(__file__).parent.parent / "data" / "samples" / "open-prompts.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    return parts["templates"], parts["topics"]


def open_prompts(split: str) -> list[str]:
    """The prompts of a split, in a fixed random order: the first n are a fair sample of it.

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
