# SPDX-License-Identifier: Apache-2.0
"""The plot of the sweep over strengths. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ...measurement.figure import GREY, PALETTE, bare, blank, error_bars, headline
from .report import finding, scorer_title

_COLUMNS = 3


def sweep_figure(report: dict[str, Any]) -> Any:
    """A matplotlib ``Figure`` with one panel each for every scorer, KL, perplexity, alpha and words
    against strength, with 95 % intervals and the backbone's value as a dashed line.
    """
    sweep = report["sweep"]
    panels: list[tuple[str, list[Any]]] = [
        (scorer_title(name), [row["scores"][name] for row in sweep]) for name in report["scorers"]
    ]
    panels += [
        ("KL from the backbone, nats per token", [row["kl"] for row in sweep]),
        ("perplexity under the backbone", [row["perplexity"] for row in sweep]),
        ("alpha: mean; bars: lowest and highest",
         [[row["alpha"][n] for n in ("mean", "min", "max")] for row in sweep]),
    ]  # fmt: skip
    if "words" not in report["scorers"]:
        panels.append(("words in a reply", [row["words"] for row in sweep]))
    columns = min(_COLUMNS, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure = blank(4.0 * columns, 2.9 * rows + 0.8)
    strengths = [row["strength"] for row in sweep]
    for i, (title, values) in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, i + 1), title, strengths, values)
    headline(
        figure, finding(report), "Over strength. Dashed: 0, the backbone. Bars: 95 % intervals."
    )
    return figure


def _panel(
    axes: Any, title: str, strengths: Sequence[float], values: Sequence[Sequence[float]]
) -> None:
    middle = [value for value, _, _ in values]
    axes.axhline(middle[0], color=GREY, linestyle="--", linewidth=0.9)
    bars = error_bars(values)
    axes.errorbar(strengths, middle, bars, fmt="o-", color=PALETTE[0], capsize=3, linewidth=1.4)
    axes.set_title(textwrap.fill(title, 38), fontsize=9)
    axes.set_xticks(strengths, [f"{s:g}" for s in strengths])
    bare(axes)
