# SPDX-License-Identifier: Apache-2.0
"""The attributes that are steered, with their scorers and prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..open_prompts import open_prompts
from ..prompts import beavertails
from ..scorers import SCORERS, scorer

OPEN, PROVOKING = "open", "provoking"


@dataclass(frozen=True)
class Attribute:
    """A property of texts that is steered.

    Attributes:
        name: name in the results.
        gold: the scorer that ranks the training samples and the candidates of best-of-n.
        heldout: scorers not used in training; the first is the one in the results.
        prompts: OPEN, or PROVOKING prompts, which need the data folder.
    """

    name: str
    gold: str
    heldout: tuple[str, ...]
    prompts: str = OPEN

    @property
    def higher_is_better(self) -> bool:
        return SCORERS[self.gold].higher_is_better

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.gold, *self.heldout)


ATTRIBUTES = {
    found.name: found
    for found in (
        Attribute("sentiment", "vader", ("afinn", "textblob")),
        Attribute("readability", "ari", ("coleman-liau", "lix")),
        Attribute("brevity", "words", ("characters",)),
        Attribute("toxicity", "alt-profanity-check", ("better-profanity",), PROVOKING),
    )
}


def measured(name: str, prompts: list[str], texts: list[str]) -> list[float]:
    """The scores of one text per prompt by the scorer ``name``, in the scorer's own unit."""
    found = scorer(name)
    pairs = zip(prompts, texts, strict=True)
    return [found.measure(prompt, [text])[0] for prompt, text in pairs]


def prompts_of(kind: str, split: str, count: int) -> list[str]:
    """The first prompts of a split: "train", "calibration" or "measure".

    Raises:
        ValueError: an unknown split.
        FileNotFoundError: provoking prompts without the data folder.
    """
    if kind == OPEN:
        return open_prompts(split)[:count]
    questions = sorted({row["question"] for row in beavertails()})
    random.Random(0).shuffle(questions)
    bounds = {"train": (0, 208), "calibration": (208, 272), "measure": (272, 480)}
    if split not in bounds:
        raise ValueError(f"prompts_of: split must be one of {', '.join(bounds)}, got {split!r}")
    return questions[slice(*bounds[split])][:count]
