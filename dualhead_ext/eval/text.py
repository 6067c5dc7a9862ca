# SPDX-License-Identifier: Apache-2.0
"""Metrics of texts alone. Imports Python only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, and each other sign by itself. (ARGS uses
    NLTK's tokenizer, which also splits contractions, so its figures differ a little.)
    """
    return _WORD.findall(text)


def repetition(text: str, n: int, plus_one: bool = True) -> float:
    """``1 - |unique n-grams| / (|n-grams| + 1)``: ARGS's rep_n, as a share.

    The 1 in the denominator makes a short text without any repetition count as repetitive.

    Args:
        text: of any length. Without any n-gram the result is 1 with ``plus_one``, otherwise 0.
        n: words in an n-gram.
        plus_one: False omits the 1 in the denominator.
    """
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams and not plus_one:
        return 0.0
    return 1.0 - len(set(grams)) / (len(grams) + plus_one)


def diversity(texts: Sequence[str], plus_one: bool = True) -> float:
    """The mean over texts of ``prod_{n=2..4} (1 - rep_n)`` (ARGS).

    With ``plus_one`` (ARGS's own formula) it grows with length: 30 different words have 0.90, 128
    have 0.98. So print the length beside it, or use the variant without.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("diversity: texts must hold at least one, got none")
    each = [math.prod(1.0 - repetition(text, n, plus_one) for n in (2, 3, 4)) for text in texts]
    return sum(each) / len(each)


def mean_length(texts: Sequence[str]) -> float:
    """The mean number of words in a text.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("mean_length: texts must hold at least one, got none")
    return sum(len(words(text)) for text in texts) / len(texts)
