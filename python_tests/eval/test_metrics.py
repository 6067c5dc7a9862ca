# SPDX-License-Identifier: Apache-2.0
import pytest
from scipy import stats

from dualhead_ext.eval.metrics import longer_is_better, wilson_interval


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (7, 10), (200, 400), (399, 400)])
def test_wilson_interval_is_scipys(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses(successes, trials):
    with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
        wilson_interval(successes, trials)


def test_longer_is_better():
    rows = [
        {"chosen": "aaa", "rejected": "b"},
        {"chosen": "a", "rejected": "bb"},
        {"chosen": "aa", "rejected": "bb"},
        {"chosen": [{"content": "aaa"}], "rejected": [{"content": "b"}]},
    ]
    assert longer_is_better(rows) == (2.5 / 4, 4)
    with pytest.raises(ValueError, match="at least one pair"):
        longer_is_better([])
