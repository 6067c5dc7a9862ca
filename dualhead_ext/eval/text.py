# SPDX-License-Identifier: Apache-2.0
"""Figures of the texts alone. Needs nothing but Python."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other sign by itself. (ARGS uses NLTK's tokenizer,
    which splits contractions further; figures are near, not equal.)
    """
    return _WORD.findall(text)


def repetition(text: str, n: int, plus_one: bool = True) -> float:
    """``1 - |unique n-grams| / (|n-grams| + 1)``: ARGS's rep_n, as a share.

    The 1 added below the line makes a short text without any repetition count as repetitive.

    Args:
        text: of any length; one without an n-gram has 1 with ``plus_one`` and 0 without.
        n: words in an n-gram.
        plus_one: False leaves the added 1 out.
    """
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams and not plus_one:
        return 0.0
    return 1.0 - len(set(grams)) / (len(grams) + plus_one)


def diversity(texts: Sequence[str], plus_one: bool = True) -> float:
    """The mean over texts of ``prod_{n=2..4} (1 - rep_n)`` (ARGS).

    With ``plus_one``, ARGS's own formula, it grows with length: 30 different words have 0.90, 128
    have 0.98. Print the length beside it, or take the variant without.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("diversity: texts must hold at least one, got none")
    each = [math.prod(1.0 - repetition(text, n, plus_one) for n in (2, 3, 4)) for text in texts]
    return sum(each) / len(each)


def mean_length(texts: Sequence[str]) -> float:
    """Words in a text, on average.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("mean_length: texts must hold at least one, got none")
    return sum(len(words(text)) for text in texts) / len(texts)
