# SPDX-License-Identifier: Apache-2.0
"""The pairs of rows in a training batch, kept on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pairing:
    """The P pairs of a batch of R rows.

    Args:
        num_rows: R.
        pairs: (better row, worse row) of each pair. A row may be in several pairs, as in a ranked
            list. Default: [all chosen; all rejected], (p, R/2 + p).
        objective: the reward head that each pair trains. Default 0.

    Attributes:
        better, worse, objective: for each pair, its rows and its reward head.
        examples: the rows of each example. Rows that are linked by pairs form one example; a row in
            no pair is an example of its own. Examples are in the order of their first rows.
        pairs_of_examples: the pairs of each example.
    """

    def __init__(
        self,
        num_rows: int,
        pairs: Sequence[tuple[int, int]] | None = None,
        objective: Sequence[int] | None = None,
    ) -> None:
        if pairs is None:
            pairs = [(p, num_rows // 2 + p) for p in range(num_rows // 2)]
        self.num_rows = num_rows
        self.better, self.worse = [b for b, _ in pairs], [w for _, w in pairs]
        self.objective = [0] * len(pairs) if objective is None else list(objective)
        self.examples = _linked(num_rows, pairs)
        example_of = {row: i for i, rows in enumerate(self.examples) for row in rows}
        self.pairs_of_examples: list[list[int]] = [[] for _ in self.examples]
        for pair, row in enumerate(self.better):
            self.pairs_of_examples[example_of[row]].append(pair)

    def __len__(self) -> int:
        """P."""
        return len(self.better)

    def in_lm(self, lm_on_chosen: bool) -> list[bool]:
        """Whether each row is in the language-model term: rows in no pair, and with
        ``lm_on_chosen`` also rows that are never the worse one.
        """
        better, worse = set(self.better), set(self.worse)
        return [
            row not in worse and (lm_on_chosen or row not in better) for row in range(self.num_rows)
        ]

    def tensors(
        self, device: torch.device, pairs: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """better, worse and objective of some pairs (default all), (P,) int64 on a device, copied
        without a synchronisation.
        """
        chosen = range(len(self)) if pairs is None else pairs
        better, worse, objective = (
            to_device([of_pair[p] for p in chosen], device)
            for of_pair in (self.better, self.worse, self.objective)
        )
        return better, worse, objective


def to_device(numbers: Sequence[int | bool], device: torch.device) -> Tensor:
    """A tensor of numbers from the host, copied without a synchronisation."""
    dtype = torch.bool if numbers and isinstance(numbers[0], bool) else torch.int64
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def _linked(num_rows: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected components, in the order of their first rows."""
    root = list(range(num_rows))

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = root[root[row]]
            row = root[row]
        return row

    for better, worse in pairs:
        a, b = sorted((find(better), find(worse)))
        root[b] = a
    members: dict[int, list[int]] = {}
    for row in range(num_rows):
        members.setdefault(find(row), []).append(row)
    return list(members.values())
