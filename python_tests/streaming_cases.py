# SPDX-License-Identifier: Apache-2.0
"""A stream of tokenised pairs, and options for a short run over it."""

import torch
from torch.utils.data import IterableDataset
from trainer_cases import pairs

# 5 steps of 2 micro-batches of 2 rows are 20 rows: two passes over 10 rows.
RUN = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
COUNT = 10


class Stream(IterableDataset):
    """A stream whose order depends on the pass."""

    def __init__(self, rows=None):
        self.rows, self.epoch, self.passes = rows or pairs(COUNT), 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self, epoch):
        return torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(epoch)
        ).tolist()

    def __iter__(self):
        self.passes.append(self.epoch)
        for index in self.order(self.epoch):
            yield self.rows[index]


class InOrder(torch.utils.data.Dataset):
    """The rows of a stream in memory. The trainer's sampler must keep their order."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
