# SPDX-License-Identifier: Apache-2.0
"""The suite's training and evaluation data, from the files below the data folder."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ...data import ASSISTANT, load_preference_data, read_jsonl
from .. import prompts

TRAIN, TEST = "hh-rlhf/train.jsonl.gz", "hh-rlhf/test.jsonl.gz"
# The subsets of pairs; a subset's index is its pairs' objective.
SUBSETS = ("helpful-base", "harmless-base")
# The two halves of the training pairs; guides and judges are trained on different ones.
HALVES = ("guide", "judge")
Row = dict[str, Any]


class Data:
    """Rows of data sets by name and count; the selection is deterministic.

    Args:
        folder: holds ``hh-rlhf/{train,test}.jsonl.gz`` and, if they are used, ``truthfulqa.csv``,
            ``mt_bench_questions.jsonl`` and corpora; default $DUALHEAD_DATA.
    Raises:
        FileNotFoundError: there is no folder, or a requested file is not in it.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        folder = folder or os.environ.get("DUALHEAD_DATA")
        if not folder:
            raise FileNotFoundError("Data: folder must be given, or DUALHEAD_DATA set, got neither")
        self.folder = Path(folder)
        self.digest: Callable[[str], str] = cache(self._digest)

    def file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"Data: there is no file {name} in {self.folder}")
        return path

    def _digest(self, name: str) -> str:
        """SHA-256 of a file."""
        return hashlib.sha256(self.file(name).read_bytes()).hexdigest()

    def dialogues(self, corpora: Sequence[str]) -> list[str]:
        """Texts to pre-train on."""
        files = (self.file(f"{name}/dialogues.jsonl.gz") for name in corpora)
        return [row["text"] for path in files for _, row in read_jsonl(path)]

    @cached_property
    def _train(self) -> list[Row]:
        return list(load_preference_data(self.file(TRAIN)))

    def training_pairs(self, half: str, count: int, subset: str | None = None) -> list[Row]:
        """The first pairs of a half, with ``objective`` set by their subset. The halves are split
        by a hash of the first human turn, so that near-duplicates stay in one half.
        """
        index = HALVES.index(half)
        rows = [
            row | {"objective": SUBSETS.index(row["subset"])}
            for row in self._train
            if _parity(row["prompt"]) == index and subset in (None, row["subset"])
        ]
        return rows[:count]

    def test_pairs(self, count: int, subset: str | None = None) -> list[Row]:
        """Pairs of the test split, in a fixed random order."""
        rows = [r for r in prompts.hh_pairs(self.file(TEST)) if subset in (None, r["subset"])]
        return _some(rows, count)

    def questions(self, name: str, count: int, fits: Callable[[Row], bool]) -> list[Row]:
        """Prompts to answer, without those that are too long.

        Args:
            name: ``"hh"`` (test split) or ``"mt_bench"`` (two turns).
        Raises:
            ValueError: fewer than ``count`` fit.
        """
        rows = {
            "hh": lambda: prompts.hh_prompts(self.file(TEST)),
            "mt_bench": lambda: prompts.mt_bench(self.file("mt_bench_questions.jsonl")),
        }[name]()
        kept = [row for row in _some(list(rows), len(rows)) if fits(row)][:count]
        if len(kept) < count:
            raise ValueError(f"Data: {name} must have {count} prompts that fit, got {len(kept)}")
        return kept

    def truthfulqa(self, count: int) -> list[Row]:
        return _some(list(prompts.truthfulqa(self.file("truthfulqa.csv"))), count)


def _some(rows: list[Row], count: int) -> list[Row]:
    return random.Random(0).sample(rows, min(count, len(rows)))


def _parity(prompt: str) -> int:
    return int(hashlib.sha256(prompt.split(ASSISTANT)[0].encode()).hexdigest(), 16) % len(HALVES)
