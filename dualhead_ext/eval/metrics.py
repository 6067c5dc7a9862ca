# SPDX-License-Identifier: Apache-2.0
"""Proportions with their uncertainty. Needs the standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..data import score_pairs


def wilson_interval(
    successes: float, trials: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """The Wilson score interval of a proportion (default 95 %): ``(p + z^2/2n -+ z sqrt(p(1-p)/n +
    z^2/4n^2)) / (1 + z^2/n)``. A tie may count as half a success.

    Raises:
        ValueError: no trials, or successes outside 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"wilson_interval: expected 0 <= successes <= trials >= 1, got {successes} of {trials}"
        )
    p, z2 = successes / trials, z * z
    centre = p + z2 / (2 * trials)
    width = z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def longer_is_better(rows: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """(share of pairs whose longer response (in characters) is the better one, number of pairs). A
    tie counts as half. A ranked list has one pair for every two different scores. This is the
    baseline for any preference accuracy.
    """
    wins, count = 0.0, 0
    for row in rows:
        for better, worse in _pairs(row):
            wins += 1.0 if better > worse else 0.5 if better == worse else 0.0
            count += 1
    if count == 0:
        raise ValueError("longer_is_better: expected at least one pair, got none")
    return wins / count, count


def _pairs(row: dict[str, Any]) -> list[tuple[int, int]]:
    """(length of the better response, of the worse one)."""
    if "responses" not in row:
        return [(text_length(row["chosen"]), text_length(row["rejected"]))]
    lengths = [text_length(response) for response in row["responses"]]
    return [(lengths[better], lengths[worse]) for better, worse in score_pairs(row["scores"])]


def text_length(response: str | list[dict[str, str]]) -> int:
    """Characters of a text, or of the contents of messages."""
    return len(response) if isinstance(response, str) else sum(len(m["content"]) for m in response)
