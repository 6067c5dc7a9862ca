# SPDX-License-Identifier: Apache-2.0
"""Plots of a results file: time per decode step for each case, and its growth with V, T and B."""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..measurement.figure import (
    MARKERS,
    PALETTE,
    bare,
    blank,
    end_labels,
    error_bars,
    headline,
    named_rows,
    plain_log,
    save,
)
from .report import grouped

_OWN = "dualhead"


def draw(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot the time per decode step; the suffix of ``path`` sets the format (png, svg, pdf).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no cases, or matplotlib does not know the suffix.
    """
    cases = grouped(results)
    if not cases:
        raise ValueError("plot: the results file must hold cases, got none")
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    figure = _blank("--plot", 9.0, 1.6 + 0.22 * len(cases))
    axes = figure.add_subplot()
    for name, color, marker in zip(names, PALETTE, MARKERS, strict=False):
        held = [(i, rows[name]) for i, rows in enumerate(cases.values()) if name in rows]
        spans = [_span(row, 1.0) for _, row in held]
        medians, where = [span[0] for span in spans], [i for i, _ in held]
        bars = error_bars(spans)
        axes.errorbar(medians, where, xerr=bars, fmt=marker, color=color, ms=5, label=name)
    named_rows(
        axes,
        [
            f"{d} x {V} {form}, B={B}, T={T}, {'sampled' if sampled else 'greedy'}"
            for d, V, form, B, T, sampled in cases
        ],
    )
    plain_log(axes.xaxis)
    axes.set_xlabel("microseconds per decode step: median and quartiles", fontsize=9)
    bare(axes, "both", 7)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    headline(figure, _finding(list(cases.values()), "decode step"), _measured_on(results))
    save(figure, path)


def draw_growth(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Plot the rows of :func:`.cases.growth_plan`: milliseconds per step against V, T and B, one
    line per contender, with quartiles.

    Raises:
        ImportError, ValueError: as :func:`draw`; also ValueError if there are no such rows.
    """
    rows = results.get("growth") or []
    if not rows:
        raise ValueError("plot: the results file must hold growth rows, got none")
    figure = _blank("--plot-growth", 11, 3.9)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, axis in zip(figure.subplots(1, 3), ("V", "T", "B"), strict=True):
        ends = []
        for name, color, marker in zip(names, PALETTE, MARKERS, strict=False):
            line = growth_line(rows, axis, name)
            spans = [_span(row, 1e-3) for row in line]
            places, medians = [row[axis] for row in line], [span[0] for span in spans]
            axes.errorbar(places, medians, error_bars(spans), fmt=f"{marker}-", color=color, ms=4)
            ends.append((places[-1], medians[-1], name, color))
        fixed = {n: line[-1][n] for n in ("V", "T", "B") if n != axis}
        axes.set_title(", ".join(f"{n} = {value:,}" for n, value in fixed.items()), fontsize=9)
        if axis != "V":  # linear in V, which shows on a linear axis only
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [str(place) for place in places], fontsize=8)
            axes.minorticks_off()
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(axis)
        axes.set_ylim(bottom=0)
        if axis == "V":
            end_labels(axes, ends)
        bare(axes)
    figure.axes[0].set_ylabel("milliseconds per step", fontsize=9)
    settings = {(row["V"], row["T"], row["B"]) for row in rows}
    cases = [
        {r["contender"]: r for r in rows if (r["V"], r["T"], r["B"]) == place} for place in settings
    ]
    what = f"d = {rows[0]['d']}, {rows[0]['format']}; {_measured_on(results)}"
    headline(figure, _finding(cases, "step"), what)
    save(figure, path)


def _span(row: dict[str, Any], factor: float) -> tuple[float, ...]:
    return tuple(factor * row[f"us_{name}"] for name in ("median", "q1", "q3"))


def _finding(cases: Sequence[dict[str, dict[str, Any]]], what: str) -> str:
    """How many times as long each contender takes as the fused step, over their common cases."""
    others = dict.fromkeys(name for rows in cases for name in rows if name != _OWN)
    parts = []
    for name in others:
        both = [rows for rows in cases if _OWN in rows and name in rows]
        ratios = sorted(rows[name]["us_median"] / rows[_OWN]["us_median"] for rows in both)
        if ratios:
            middle, low, high = median(ratios), ratios[0], ratios[-1]
            parts.append(f"{name} {middle:.2g} ({low:.2g} to {high:.2g})")
    if not parts:
        return f"The fused {what} alone"
    return f"Times as long as the fused {what} takes, median and range: {', '.join(parts)}"


def _measured_on(results: dict[str, Any]) -> str:
    threads = f", {results['threads']} threads" if "threads" in results else ""
    return f"{results['device']}{threads}, commit {str(results.get('commit'))[:12]}"


def growth_line(rows: list[dict[str, Any]], axis: str, contender: str) -> list[dict[str, Any]]:
    """A contender's rows in which only ``axis`` ("V", "T" or "B") differs from the largest V,
    T = 256, B = 1, sorted by ``axis``. Of several rows with equal ``axis``, the last."""
    middle = {"V": max(row["V"] for row in rows), "T": 256, "B": 1}
    kept = {
        row[axis]: row
        for row in rows
        if row["contender"] == contender
        and all(row[name] == value for name, value in middle.items() if name != axis)
    }
    return [kept[place] for place in sorted(kept)]


def _blank(option: str, width: float, height: float) -> Any:
    try:
        return blank(width, height)
    except ImportError as error:
        raise ImportError(
            f"{option} needs matplotlib: pip install 'dualhead_ext[plot]' (or matplotlib)"
        ) from error
