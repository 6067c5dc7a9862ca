# SPDX-License-Identifier: Apache-2.0
"""The sweep over strengths as one picture. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import finding, scorer_title

_BLUE, _GREY = "#0072b2", "0.45"  # of Okabe and Ito: distinct to everybody
_COLUMNS = 3


def sweep_png(report: dict[str, Any]) -> bytes:
    """A panel each for every scorer, KL, perplexity, alpha and words over strength, with 95 %
    intervals; the backbone's value as a dashed line.
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
    figure = Figure(figsize=(4.0 * columns, 2.9 * rows + 0.8), layout="constrained")
    strengths = [row["strength"] for row in sweep]
    for i, (title, values) in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, i + 1), title, strengths, values)
    width = 33 * columns
    figure.suptitle(textwrap.fill(finding(report), width), fontsize=11, fontweight="bold")
    figure.supxlabel("strength (dashed: 0, the backbone); bars: 95 % intervals", fontsize=9)
    file = io.BytesIO()
    # No date or version inside: the same figures make the same file.
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _panel(
    axes: Axes, title: str, strengths: Sequence[float], values: Sequence[Sequence[float]]
) -> None:
    middle = [value for value, _, _ in values]
    bars = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
    axes.axhline(middle[0], color=_GREY, linestyle="--", linewidth=0.9)
    axes.errorbar(strengths, middle, bars, fmt="o-", color=_BLUE, capsize=3, linewidth=1.4)
    axes.set_title(textwrap.fill(title, 38), fontsize=9)
    axes.set_xticks(strengths, [f"{s:g}" for s in strengths])
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="0.9")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
