# SPDX-License-Identifier: Apache-2.0
"""What the suite trains and measures on, from the files below the data folder."""

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
# A pair's objective: its place in a head's K.
SUBSETS = ("helpful-base", "harmless-base")
# Tells the two halves of the training pairs apart; what guides never sees what judges.
HALVES = ("guide", "judge")
Row = dict[str, Any]


class Data:
    """Rows by name and number, always the same ones.

    Args:
        folder: holds ``hh-rlhf/{train,test}.jsonl.gz`` and, for what is asked of them,
            ``truthfulqa.csv``, ``mt_bench_questions.jsonl`` and corpora; default $DUALHEAD_DATA.
    Raises:
        FileNotFoundError: no folder, or no such file in it, when it is asked for.
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
        """The first pairs of a half, ``objective`` by their subset. Halves are told apart by a hash
        of the first human turn, so that near-copies stay together.
        """
        index = HALVES.index(half)
        rows = [
            row | {"objective": SUBSETS.index(row["subset"])}
            for row in self._train
            if _parity(row["prompt"]) == index and subset in (None, row["subset"])
        ]
        return rows[:count]

    def test_pairs(self, count: int, subset: str | None = None) -> list[Row]:
        """Of the test split, in a fixed random order."""
        rows = [r for r in prompts.hh_pairs(self.file(TEST)) if subset in (None, r["subset"])]
        return _some(rows, count)

    def questions(self, name: str, count: int, fits: Callable[[Row], bool]) -> list[Row]:
        """Prompts to answer, those that fit.

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
