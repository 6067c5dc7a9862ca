# SPDX-License-Identifier: Apache-2.0
"""Preferences from files and the hub: pairs with prompt, chosen, rejected, or ranked lists with
prompt, responses, scores, whatever layout they come in.

Understood are TRL's preference format (strings, or lists of messages; with or without a prompt
column), HH-RLHF's (two whole dialogues), and ranked lists: several responses to one prompt, each
with a score. A row that cannot be used is skipped and reported with its line; a file that cannot be
read is an exception that names the line.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"
# The sample of HH-RLHF harmless-base inside this package, and the model trained to go with it.
EMBEDDED = "embedded"
_SPLITS = ("train", "test")
# The two layouts of a file, as they are called in messages.
PAIRS, RANKED = "pairs", "ranked lists"

logger = logging.getLogger(__name__)


def embedded_backbone_path() -> Path:
    """The folder of the small Llama-shaped model that comes with this package; its recipe is beside
    it.
    """
    return Path(__file__).parent / "backbone"


def embedded_pairs_path(split: str = "train") -> Path:
    """The sample of HH-RLHF harmless-base pairs (MIT) that comes with this package; split "train"
    or "test".
    """
    if split not in _SPLITS:
        raise ValueError(
            f"embedded_pairs_path: split must be one of {', '.join(_SPLITS)}, got {split!r}"
        )
    return Path(__file__).parent / "samples" / f"harmless-base-{split}.jsonl.gz"


@dataclass
class DataReport:
    """What became of a file's rows (``unit`` names them): how many are kept, and the lines skipped
    for each reason.
    """

    source: str
    kept: int = 0
    skipped: dict[str, list[int]] = field(default_factory=dict)
    unit: str = PAIRS

    def skip(self, reason: str, line: int) -> None:
        """Note a row that cannot be used."""
        self.skipped.setdefault(reason, []).append(line)

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept} {self.unit}"
        for reason, lines in self.skipped.items():
            shown = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
            text += f"; skipped {len(lines)} ({reason}; line {shown})"
        return text


class PreferenceData(list):
    """Rows ``{"prompt", "chosen", "rejected"[, "objective"][, "subset"]}``, or ``{"prompt",
    "responses", "scores"[, "ended"][, ...]}``: texts are strings or lists of messages, scores
    floats; ``ended`` is false for a response that was cut off before its end.
    ``report`` says what was skipped.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], report: DataReport) -> None:
        super().__init__(rows)
        self.report = report


def load_preference_data(
    path_or_name: str | os.PathLike, split: str | None = None
) -> PreferenceData:
    """Read preference pairs or ranked lists.

    Args:
        path_or_name: a .jsonl or .jsonl.gz file, ``"embedded"`` (the sample in this package), or
            the name of a dataset on the hub (needs the extra ``data``).
        split: of the embedded sample or a hub dataset; default "train". A file has none.
    Returns:
        rows; ``.report`` says what was skipped and why.
    Raises:
        FileNotFoundError: no such file. ValueError: a broken line (naming it), wrong columns, pairs
            and ranked lists in one file, no usable row, a split for a file. ImportError: a hub name
            without the ``datasets`` package.
    """
    name = os.fspath(path_or_name)
    if name == EMBEDDED:
        return _collect(name, read_jsonl(embedded_pairs_path(split or "train")))
    rows = rows_of("load_preference_data", name, split, default_split="train")
    return _collect(name, rows)


def rows_of(
    function: str,
    source: str | os.PathLike,
    split: str | None,
    default_split: str,
    configuration: str | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a .jsonl or .jsonl.gz file, or of a dataset on the hub.

    Args:
        function: whose name errors begin with.
        split, configuration: of a hub dataset; a file has no split.
    Raises:
        as :func:`load_preference_data`.
    """
    name = os.fspath(source)
    if name.endswith((".jsonl", ".jsonl.gz", ".json", ".gz")) or os.path.exists(name):
        if split is not None:
            raise ValueError(f"{function}: split must be None for a file, got {split!r}")
        return read_jsonl(name)
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{function}: there is no file {name}")
    return _hub_rows(function, name, split or default_split, configuration)


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line of a .jsonl or .jsonl.gz file; empty lines are
    passed over.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file. ValueError: naming the line that is not
            a JSON object, or where a compressed file breaks off.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"load_preference_data: {path} is a folder; expected a .jsonl or .jsonl.gz file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"load_preference_data: there is no file {path}")
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                yield number, row
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}, after line {number}: cannot be read on ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {number}: not UTF-8 ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _hub_rows(
    function: str, name: str, split: str, configuration: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{function}: {name!r} is no file, and hub datasets need the "
            "datasets package: pip install 'dualhead_ext[data]'"
        ) from error
    chosen = () if configuration is None else (configuration,)
    return enumerate(load_dataset(name, *chosen, split=split), start=1)


def _collect(source: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> PreferenceData:
    report, kept = DataReport(source), []
    layout: tuple[str, int] | None = None  # of the file, and the line that shows it
    for line, row in rows:
        try:
            found = _layout_of(row)
            layout = layout or (found, line)
            if found != layout[0]:
                raise ValueError(
                    f"expected {layout[0]}, as line {layout[1]} is, got {found}; "
                    "put pairs and ranked lists into files of their own"
                )
            usable = _pair_of(row) if found == PAIRS else _ranked_of(row)
            usable |= _labels_of(row)
        except _Unusable as reason:
            report.skip(str(reason), line)
            continue
        except ValueError as error:
            raise ValueError(f"{source}, line {line}: {error}") from error
        kept.append(usable)
    report.kept = len(kept)
    report.unit = layout[0] if layout else PAIRS
    if not kept:
        raise ValueError(f"load_preference_data: no usable row in {report}")
    if report.skipped:
        logger.warning("%s", report)
    return PreferenceData(kept, report)


class _Unusable(Exception):
    """A row to skip, and why."""


def _layout_of(row: dict[str, Any]) -> str:
    """`PAIRS` or `RANKED`, by the columns that are there."""
    pair = [name for name in ("chosen", "rejected") if row.get(name) is not None]
    ranked = [name for name in ("responses", "scores") if row.get(name) is not None]
    if pair and ranked:
        raise ValueError(
            f"expected chosen and rejected, or responses and scores, got {', '.join(pair + ranked)}"
        )
    if len(pair) < 2 and len(ranked) < 2:
        raise ValueError(
            "expected columns chosen and rejected (and prompt), or prompt, responses and scores, "
            f"got {', '.join(row) or 'none'}"
        )
    return PAIRS if pair else RANKED


def _pair_of(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    kinds = {_kind(value) for value in (chosen, rejected, prompt) if value is not None}
    if len(kinds) > 1:
        raise ValueError("prompt, chosen and rejected must all be strings or all lists of messages")
    if prompt is None:
        split = _split_dialogues if kinds == {"text"} else _split_messages
        prompt, chosen, rejected = split(chosen, rejected)
    if chosen == rejected:
        raise _Unusable("chosen equals rejected")
    if _is_empty(chosen) or _is_empty(rejected):
        raise _Unusable("empty response")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _ranked_of(row: dict[str, Any]) -> dict[str, Any]:
    prompt, responses, scores = row.get("prompt"), row["responses"], row["scores"]
    if prompt is None:
        raise ValueError(f"expected columns prompt, responses and scores, got {', '.join(row)}")
    for name, values in (("responses", responses), ("scores", scores)):
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    if len(responses) != len(scores):
        raise ValueError(
            "responses and scores must have one length, got "
            f"{len(responses)} responses and {len(scores)} scores"
        )
    scores = [_score(value) for value in scores]
    if len({_kind(value) for value in (prompt, *responses)}) > 1:
        raise ValueError("prompt and responses must all be strings or all lists of messages")
    if len(responses) < 2:
        raise _Unusable("fewer than two responses")
    if any(_is_empty(response) for response in responses):
        raise _Unusable("empty response")
    if not score_pairs(scores):
        raise _Unusable("no two different scores")
    ranked = {"prompt": prompt, "responses": list(responses), "scores": scores}
    ended = row.get("ended")
    if ended is not None:
        if not isinstance(ended, list) or [type(x) for x in ended] != [bool] * len(responses):
            raise ValueError(f"ended must be {len(responses)} booleans, got {ended!r}")
        ranked["ended"] = ended
    return ranked


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


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    ):
        return "messages"
    raise ValueError(
        f"expected a string or a list of {{role, content}} messages, got {type(value).__name__}"
    )


def _is_empty(response: str | list[dict[str, str]]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not response or not any(message["content"].strip() for message in response)


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """HH-RLHF: the prompt is the longest common prefix, cut after its last assistant marker.

    Cutting each text at its own last marker would give two prompts where a response holds a
    further turn.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    same = next((i for i, (a, b) in pairs if a != b), shorter)
    end = chosen.rfind(ASSISTANT, 0, same)
    if end < 0:
        raise _Unusable("no prompt in common that ends in an assistant turn")
    end += len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def _split_messages(chosen: list, rejected: list) -> tuple[list, list, list]:
    """TRL's implicit prompt: the messages that both begin with."""
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    if end == 0:
        raise _Unusable("no message in common")
    return chosen[:end], chosen[end:], rejected[end:]
