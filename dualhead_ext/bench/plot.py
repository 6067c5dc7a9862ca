# SPDX-License-Identifier: Apache-2.0
"""A results file as a picture: microseconds per decode step, a group of bars per case."""

from __future__ import annotations

import os
from typing import Any

from .report import grouped


def draw(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a plot; the suffix says the format (png, svg, pdf).

    Raises:
        ImportError: matplotlib is not installed. ValueError: no cases, or a suffix that matplotlib
            does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib: pip install 'dualhead_ext[plot]' (or matplotlib)"
        ) from error
    cases = grouped(results)
    if not cases:
        raise ValueError("plot: the results file must hold cases, got none")
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    figure = Figure(figsize=(10, 1.5 + 0.2 * len(cases) * (len(names) + 1)), layout="constrained")
    axes = figure.add_subplot()
    height = 1 / (len(names) + 1)
    for place, name in enumerate(names):
        held = [(i, rows[name]) for i, rows in enumerate(cases.values()) if name in rows]
        medians = [row["us_median"] for _, row in held]
        below = [row["us_median"] - row["us_q1"] for _, row in held]
        above = [row["us_q3"] - row["us_median"] for _, row in held]
        where = [i + place * height for i, _ in held]
        axes.barh(where, medians, height, xerr=(below, above), label=name)
    labels = [
        f"{d} x {V} {form}\nB={B} T={T} {'sampled' if sampled else 'greedy'}"
        for d, V, form, B, T, sampled in cases
    ]
    middle = (len(names) - 1) / 2 * height
    axes.set_yticks([i + middle for i in range(len(cases))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds per decode step: median and quartiles")
    axes.set_title(f"{results['device']}, commit {str(results.get('commit'))[:12]}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path)
