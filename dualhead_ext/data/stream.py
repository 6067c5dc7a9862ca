# SPDX-License-Identifier: Apache-2.0
"""Rows of data that are not in memory, tokenised as they are read."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from torch.utils.data import IterableDataset

from . import DataReport, usable_rows
from .collate import check_tokenizer, coded_row, is_tokenized, tokenize_row
from .files import Rows

logger = logging.getLogger(__name__)

# The rows by which a resumed run recognises a stream.
_FIRST_ROWS = 16


class TokenizedStream(IterableDataset):
    """An endless stream of tokenised rows: it passes over an ``IterableDataset`` again and again,
    and calls its ``set_epoch``, if it has one, before each pass. Row i belongs to process i modulo
    ``shares``; each process tokenises its own rows.

    Args:
        name: the name of the data in errors and in the log.
        rows: rows of text, as :func:`dualhead_ext.data.preference_rows` takes them, or tokenised.
        tokenizer, max_length: see :func:`dualhead_ext.data.collate.tokenize_pairs`.
        share, shares: the index of this process, and the number of processes.
    """

    def __init__(
        self, name: str, rows: Any, tokenizer: Any, max_length: int, share: int = 0, shares: int = 1
    ) -> None:
        self.name, self.rows = name, rows
        self.tokenizer, self.max_length = tokenizer, max_length
        self.share, self.shares = share, shares
        self.check: Callable[[int, dict[str, Any]], None] = lambda number, row: None
        self._reported: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            report, empty = DataReport(self.name, place="row"), True
            for row in self._one_pass(report):
                empty = False
                yield row
            if empty:
                raise ValueError(
                    f"{self.name}: must have a usable row for each of {self.shares} processes, got "
                    f"{report}"
                )

    def _one_pass(self, report: DataReport) -> Iterator[dict[str, Any]]:
        numbered = enumerate(self.rows)
        own = ((i, row) for i, row in numbered if i % self.shares == self.share)
        first = next(own, None)
        if first is None:
            return
        coded: Iterator[tuple[int, dict[str, Any]]] = itertools.chain([first], own)
        if not is_tokenized(first[1]):
            if self.tokenizer is None:
                raise ValueError(
                    f"{self.name} holds text, which needs processing_class, a tokenizer"
                )
            check_tokenizer(self.tokenizer, self.max_length)
            coded = self._coded(Rows(coded, "row"), report)
        for number, row in coded:
            self.check(number, row)
            yield row

    def _coded(self, rows: Rows, report: DataReport) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in usable_rows(self.name, rows, report):
            texts = tokenize_row(number, row, self.tokenizer, self.max_length, report)
            for reason in report.skipped.keys() - self._reported:
                self._reported.add(reason)
                where = report.skipped[reason][-1]
                logger.warning(
                    "%s: row %d is skipped, as others like it: %s", self.name, where, reason
                )
            if texts is not None:
                yield number, coded_row(row, texts)

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` rows of this process, from several passes if necessary."""
        return list(itertools.islice(self, count))

    @cached_property
    def first_rows(self) -> list[dict[str, Any]]:
        """The rows by which a resumed run recognises the stream; read once."""
        return self.first(_FIRST_ROWS)
