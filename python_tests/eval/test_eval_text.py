# SPDX-License-Identifier: Apache-2.0
"""Figures of texts, against counts by hand."""

import pytest

from dualhead_ext.eval import text


def test_words():
    assert text.words("Don't  stop: it's 3.5!") == [
        "Don", "'", "t", "stop", ":", "it", "'", "s", "3", ".", "5", "!",
    ]  # fmt: skip
    assert text.words("") == []


@pytest.mark.parametrize("n, expected", [(1, 1 - 3 / 6), (2, 1 - 3 / 5), (3, 1 - 3 / 4)])
def test_repetition_by_hand(n, expected):
    assert text.repetition("a b a b c", n) == pytest.approx(expected)


def test_repetition_without_the_added_one():
    assert text.repetition("a b c d", 2, plus_one=False) == 0.0
    assert text.repetition("a a a", 2, plus_one=False) == 0.5
    assert text.repetition("a", 2, plus_one=False) == 0.0
    assert text.repetition("a", 2) == 1.0


@pytest.mark.parametrize("count, expected", [(3, 0.0), (4, 0.25), (10, 0.70), (30, 0.90)])
def test_diversity_of_different_words_grows_with_length(count, expected):
    """Diversity depends on length: for 10 different words it is 9 / 10 * 8 / 9 * 7 / 8."""
    line = " ".join(f"w{i}" for i in range(count))
    assert text.diversity([line]) == pytest.approx(expected, abs=0.005)
    assert text.diversity([line], plus_one=False) == 1.0


def test_diversity_is_a_mean():
    both = ["a a a a a a", "b c d e f g"]
    assert text.diversity(both) == pytest.approx(
        (text.diversity(both[:1]) + text.diversity(both[1:])) / 2
    )
    assert text.diversity(both[:1]) < text.diversity(both[1:])


def test_mean_length():
    assert text.mean_length(["a b", "c d e f"]) == 3.0


@pytest.mark.parametrize("function", [text.diversity, text.mean_length])
def test_no_texts(function):
    with pytest.raises(ValueError, match="got none"):
        function([])
