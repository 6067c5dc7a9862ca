# SPDX-License-Identifier: Apache-2.0
"""A results file as a picture: microseconds per decode step, a group of bars per case; and how they
grow with V, T and B."""

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
    Figure = _figure_class("--plot")
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


def draw_growth(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a plot of the rows of :func:`.cases.growth_plan`: milliseconds per step against V, T
    and B, a line per contender, with quartiles.

    Raises:
        ImportError, ValueError: as :func:`draw`; ValueError: no such rows.
    """
    Figure = _figure_class("--plot-growth")
    rows = results.get("growth") or []
    if not rows:
        raise ValueError("plot: the results file must hold growth rows, got none")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, axis in zip(figure.subplots(1, 3), ("V", "T", "B"), strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            line = growth_line(rows, axis, name)
            medians = [row["us_median"] / 1e3 for row in line]
            below = [(row["us_median"] - row["us_q1"]) / 1e3 for row in line]
            above = [(row["us_q3"] - row["us_median"]) / 1e3 for row in line]
            axes.errorbar(
                [row[axis] for row in line], medians, (below, above), marker=".", label=name
            )
        fixed = {n: line[-1][n] for n in ("V", "T", "B") if n != axis}
        axes.set_title(", ".join(f"{n} = {value}" for n, value in fixed.items()), fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks([row[axis] for row in line], [str(row[axis]) for row in line], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("milliseconds per step")
    figure.axes[0].legend(fontsize=8)
    what = f"d = {rows[0]['d']}, {rows[0]['format']}"
    where = f"{results['device']}, {results['threads']} threads"
    commit = str(results.get("commit"))[:12]
    figure.suptitle(f"{what}; {where}, commit {commit}", fontsize=9)
    figure.savefig(path)


def growth_line(rows: list[dict[str, Any]], axis: str, contender: str) -> list[dict[str, Any]]:
    """A contender's rows in which only ``axis`` ("V", "T" or "B") differs from the largest V,
    T = 256, B = 1; by rising ``axis``. Of two rows for one place, the last."""
    middle = {"V": max(row["V"] for row in rows), "T": 256, "B": 1}
    kept = {
        row[axis]: row
        for row in rows
        if row["contender"] == contender
        and all(row[name] == value for name, value in middle.items() if name != axis)
    }
    return [kept[place] for place in sorted(kept)]


def _figure_class(option: str) -> type:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{option} needs matplotlib: pip install 'dualhead_ext[plot]' (or matplotlib)"
        ) from error
    return Figure
