# SPDX-License-Identifier: Apache-2.0
"""Means with 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000


def mean_interval(values: Sequence[float]) -> list[float]:
    """[mean, low, high]: the percentile bootstrap over ``values``; the same numbers each time.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean_interval: values must hold at least one, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return [mean, mean, mean]
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return [mean, float(found.low), float(found.high)]
