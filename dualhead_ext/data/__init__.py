# SPDX-License-Identifier: Apache-2.0
"""Preference data from files and the hub: pairs with prompt, chosen, rejected, or ranked lists with
prompt, responses, scores.

Supported are TRL's preference format (strings or lists of messages, with or without a prompt
column), HH-RLHF's (two whole dialogues), and ranked lists: several responses to one prompt, each
with a score. A row that cannot be used is skipped and reported with its line. A file that cannot be
read raises an exception that names the line.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.foreign import shown
from .files import Rows, read_jsonl, read_lines, rows_in, rows_of
from .texts import (
    ASSISTANT,
    HUMAN,
    Text,
    Unusable,
    is_dialogue,
    is_empty,
    prompt_of_messages,
    split_messages,
    split_texts,
    text_of,
)

__all__ = [
    "ASSISTANT",
    "EMBEDDED",
    "HUMAN",
    "DataReport",
    "PreferenceData",
    "embedded_backbone_path",
    "embedded_pairs_path",
    "load_preference_data",
    "preference_rows",
    "read_jsonl",
    "read_lines",
    "rows_of",
    "score_pairs",
]

# The name of the sample of HH-RLHF harmless-base in this package, and of the model trained on it.
EMBEDDED = "embedded"
_SPLITS = ("train", "test")
# The names of the two layouts in messages.
PAIRS, RANKED = "pairs", "ranked lists"

logger = logging.getLogger(__name__)


def embedded_backbone_path() -> Path:
    """The folder of the small Llama model that comes with this package, with its recipe."""
    return Path(__file__).parent / "backbone"


def embedded_pairs_path(split: str = "train") -> Path:
    """The file of the sample of HH-RLHF harmless-base pairs (MIT) in this package. split: "train"
    (default) or "test".

    Raises:
        ValueError: another split.
    """
    if split not in _SPLITS:
        raise ValueError(
            f"embedded_pairs_path: split must be one of {', '.join(_SPLITS)}, got {split!r}"
        )
    return Path(__file__).parent / "samples" / f"harmless-base-{split}.jsonl.gz"


@dataclass
class DataReport:
    """How many rows were kept, and which were skipped for which reason.

    Attributes:
        source: the name of the data.
        kept: the number of rows kept.
        skipped: the numbers of the skipped rows, by reason.
        unit: what the rows are: "pairs" or "ranked lists".
        place: what the numbers count: "line" or "row".
    """

    source: str
    kept: int = 0
    skipped: dict[str, list[int]] = field(default_factory=dict)
    unit: str = PAIRS
    place: str = "line"

    def skip(self, reason: str, line: int) -> None:
        """Note a row that cannot be used."""
        self.skipped.setdefault(reason, []).append(line)

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept} {self.unit}"
        for reason, lines in self.skipped.items():
            first = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
            text += f"; skipped {len(lines)} ({reason}; {self.place} {first})"
        return text


class PreferenceData(list):
    """A list of rows ``{"prompt", "chosen", "rejected"[, "objective"][, "subset"]}``, or
    ``{"prompt", "responses", "scores"[, "ended"][, "objective"][, "subset"]}``. Texts are strings
    or lists of messages, scores are floats; ``ended`` is False for a response that was cut off.
    ``report`` (:class:`DataReport`) says which rows were skipped.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], report: DataReport) -> None:
        super().__init__(rows)
        self.report = report


def load_preference_data(
    path_or_name: str | os.PathLike, split: str | None = None
) -> PreferenceData:
    """Read preference pairs or ranked lists.

    Args:
        path_or_name: a file (JSON lines, a JSON array, CSV or Parquet, compressed or not), a folder
            of the datasets library, ``"embedded"`` (the sample in this package), the name of a
            dataset on the hub, or the URL of a file (``https://``, ``hf://``, ``s3://``, ``gs://``
            and other protocols of fsspec). Folders, Parquet, the hub and URLs need the extra
            ``data``; ``s3://`` also needs s3fs, ``gs://`` gcsfs.
        split: of the embedded sample, a folder or a hub dataset. Default "train". Files have none.
    Returns:
        the rows; ``.report`` says which rows were skipped, and why.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken line, wrong columns, pairs and ranked lists in one file, no usable row,
            or a split for a file.
        ImportError: a package is missing; the message names the extra.
    """
    name = os.fspath(path_or_name)
    if name == EMBEDDED:
        return _collect(name, read_jsonl(embedded_pairs_path(split or "train")))
    return _collect(name, rows_of("load_preference_data", name, split, default_split="train"))


def preference_rows(data: Any, source: str = "preference_rows") -> PreferenceData:
    """:func:`load_preference_data` for data in memory.

    Args:
        data: a sequence of dicts, a ``datasets.Dataset`` or a pandas DataFrame.
        source: the name of the data in errors and in the report.
    Raises:
        TypeError: another type of data.
        ValueError: see :func:`load_preference_data`.
    """
    if isinstance(data, dict):
        raise TypeError(
            f"{source} must be rows, got a {type(data).__name__} of {shown(data)}; "
            "pass one of these"
        )
    rows = rows_in(data)
    if rows is None:
        raise TypeError(f"{source} must be a sequence of rows, got {type(data).__name__}")
    return _collect(source, rows)


@dataclass
class _Row:
    """A row while it is read: its number, its prompt (or None), its responses, other columns."""

    place: int
    prompt: Text | None
    responses: list[Text]
    others: dict[str, Any]


def _read(source: str, rows: Rows, report: DataReport) -> Iterator[_Row]:
    """The rows that are usable when looked at one by one. Others go into the report."""
    layout: tuple[str, int] | None = None  # the file's layout, and the line that shows it
    for number, row in rows:
        try:
            name = _layout_of(row)
            layout = layout or (name, number)
            if name != layout[0]:
                raise ValueError(
                    f"expected {layout[0]}, as {rows.place} {layout[1]} is, got {name}; "
                    "put pairs and ranked lists into separate files"
                )
            report.unit = layout[0]
            read = _read_row(name, number, row)
        except Unusable as reason:
            report.skip(str(reason), number)
        except ValueError as error:
            raise ValueError(f"{source}, {rows.place} {number}: {error}") from error
        else:
            yield read


def _collect(source: str, rows: Rows) -> PreferenceData:
    report = DataReport(source, place=rows.place)
    found = list(_read(source, rows, report))
    _leave_out_repeated_prompts(found)
    kept = []
    for read in found:
        try:
            kept.append(_finish(read))
        except Unusable as reason:
            report.skip(str(reason), read.place)
    report.kept = len(kept)
    if not kept:
        raise ValueError(f"load_preference_data: no usable row in {report}")
    if report.skipped:
        logger.warning("%s", report)
    return PreferenceData(kept, report)


def usable_rows(
    source: str, rows: Rows, report: DataReport
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of each usable row as it is read, for data that are not in memory. Plain-text
    responses that begin with their prompt keep it: whether all rows do so is not known.
    """
    for read in _read(source, rows, report):
        _leave_out_repeated_prompts([read], whole_texts=False)
        try:
            row = _finish(read)
        except Unusable as reason:
            report.skip(str(reason), read.place)
        else:
            report.kept += 1
            yield read.place, row


def _layout_of(row: dict[str, Any]) -> str:
    """`PAIRS` or `RANKED`, by the columns that exist and are not null."""
    columns = {PAIRS: ("chosen", "rejected"), RANKED: ("responses", "scores")}
    there = [layout for layout, names in columns.items() if all(name in row for name in names)]
    filled = {
        layout: [name for name in names if row.get(name) is not None]
        for layout, names in columns.items()
    }
    if all(filled.values()):
        raise ValueError(
            "expected chosen and rejected, or responses and scores, got "
            f"{', '.join(filled[PAIRS] + filled[RANKED])}"
        )
    if not there:
        raise ValueError(
            "expected columns chosen and rejected (and prompt), or prompt, responses and scores, "
            f"got {shown(row) or 'none'}"
        )
    layout = RANKED if filled[RANKED] or PAIRS not in there else PAIRS
    for name in columns[layout]:
        if row.get(name) is None:
            raise Unusable(f"{name} is null")
    return layout


def _read_row(layout: str, number: int, row: dict[str, Any]) -> _Row:
    """The texts of a row, all strings or all lists of messages."""
    others = _labels_of(row)
    if layout == PAIRS:
        responses = [row["chosen"], row["rejected"]]
    else:
        responses, others["scores"] = _scored(row)
        if row.get("ended") is not None:
            others["ended"] = _ended(row["ended"], len(responses))
    prompt = row.get("prompt")
    if prompt is None and layout == RANKED:
        raise ValueError(f"expected columns prompt, responses and scores, got {shown(row)}")
    responses = [text_of(response) for response in responses]
    prompt = None if prompt is None else text_of(prompt)
    if isinstance(prompt, str) and all(isinstance(response, list) for response in responses):
        prompt = prompt_of_messages(prompt, responses)  # UltraFeedback's layout
    if len({type(text) for text in (prompt, *responses) if text is not None}) > 1:
        raise ValueError("prompt and responses must all be strings or all lists of messages")
    return _Row(number, prompt, responses, others)


def _scored(row: dict[str, Any]) -> tuple[list[Any], list[float]]:
    responses, scores = row["responses"], row["scores"]
    for name, values in (("responses", responses), ("scores", scores)):
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    if len(responses) != len(scores):
        raise ValueError(
            "responses and scores must have one length, got "
            f"{len(responses)} responses and {len(scores)} scores"
        )
    return list(responses), [_score(value) for value in scores]


def _ended(ended: Any, count: int) -> list[bool]:
    if not isinstance(ended, list) or [type(x) for x in ended] != [bool] * count:
        raise ValueError(f"ended must be {count} booleans, got {ended!r}")
    return ended


def _leave_out_repeated_prompts(rows: list[_Row], whole_texts: bool | None = None) -> None:
    """Remove the prompt from responses that begin with it. Messages and dialogues are handled row
    by row. Other text is changed only if ``whole_texts`` (default: whether all such rows begin with
    their prompts), since an answer may begin like its question.
    """

    def repeated(row: _Row) -> bool:
        prompt = row.prompt
        if not prompt:
            return False
        return all(text[: len(prompt)] == prompt for text in row.responses)

    plain = [row for row in rows if isinstance(row.prompt, str) and not is_dialogue(row.prompt)]
    if whole_texts is None:
        whole_texts = all(map(repeated, plain))
    for row in rows:
        kind_is_sure = not isinstance(row.prompt, str) or is_dialogue(row.prompt)
        if row.prompt and repeated(row) and (kind_is_sure or whole_texts):
            row.responses = [text[len(row.prompt) :] for text in row.responses]


def _finish(row: _Row) -> dict[str, Any]:
    """The finished row.

    Raises:
        Unusable: the row must be skipped.
    """
    prompt, responses, scores = row.prompt, row.responses, row.others.get("scores")
    if prompt is None:
        split: Any = split_texts if isinstance(responses[0], str) else split_messages
        prompt, *responses = split(*responses)
    if scores is not None and len(responses) < 2:
        raise Unusable("fewer than two responses")
    if scores is None and responses[0] == responses[1]:
        raise Unusable("chosen equals rejected")
    if any(map(is_empty, responses)):
        raise Unusable("empty response")
    if scores is not None and not score_pairs(scores):
        raise Unusable("no two different scores")
    if scores is None:
        return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]} | row.others
    return {"prompt": prompt, "responses": responses} | row.others


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"scores must be numbers, got {value!r}")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise ValueError(f"scores must be finite, got {score!r}")
    return score


def _labels_of(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that rows of both layouts may have."""
    labels = {}
    objective = row.get("objective")
    if isinstance(objective, str) and objective.isdecimal():  # from a CSV file
        objective = int(objective)
    if isinstance(objective, float) and objective.is_integer():  # from a column with nulls
        objective = int(objective)
    if objective is not None:
        if isinstance(objective, bool) or not isinstance(objective, int) or objective < 0:
            raise ValueError(f"objective must be an integer >= 0, got {objective!r}")
        labels["objective"] = objective
    if isinstance(row.get("subset"), str):
        labels["subset"] = row["subset"]
    return labels


def score_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse): indices of all pairs of responses with different scores.

    >>> score_pairs([1.0, 3.0, 1.0])
    [(1, 0), (1, 2)]
    """
    indices = range(len(scores))
    return [(i, j) for i in indices for j in indices if scores[i] > scores[j]]
