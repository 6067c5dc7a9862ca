# SPDX-License-Identifier: Apache-2.0
"""The style of this project's plots: colours that colour-blind readers can tell apart, a title that
states the finding, no frame, labels beside the lines. Needs matplotlib (the extra ``plot``).
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

# The palette of Okabe and Ito (2008), also distinct to colour-blind readers; darkest first.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # in grey print the shape tells them apart
GREY = "0.45"
_DOTS_PER_INCH = 110
_LETTERS_PER_INCH = 10  # of the title


def blank(width: float, height: float) -> Any:
    """An empty matplotlib ``Figure`` of ``width`` x ``height`` inches with constrained layout.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def headline(figure: Any, finding: str, note: str = "") -> None:
    """Write the finding at the top and how it was measured at the bottom, both left-aligned."""
    width = figure.get_figwidth()
    lines = textwrap.fill(finding, int(_LETTERS_PER_INCH * width))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if note:
        lines = textwrap.fill(note, int(1.5 * _LETTERS_PER_INCH * width))
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=8, color=GREY)


def bare(axes: Any, grid: str | None = "y", size: float = 8) -> None:
    """Remove the top and right frame, shrink the tick labels, draw a faint grid along ``grid``."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=size)
    for axis in (axes.xaxis, axes.yaxis):
        if type(axis.get_major_locator()).__name__ == "AutoLocator":
            axis.get_major_locator().set_params(nbins=6)  # so that numbers do not touch
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color="0.9")


def error_bars(points: Iterable[Sequence[float]]) -> list[list[float]]:
    """``[value, low, high]`` points as matplotlib's error bars: lengths below, lengths above."""
    points = list(points)
    return [[v - low for v, low, _ in points], [high - v for v, _, high in points]]


def named_rows(axes: Any, names: Sequence[str]) -> None:
    """Label rows 0, 1, ... of the y axis with ``names``, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def end_labels(axes: Any, ends: Iterable[tuple[float, float, str, str]]) -> None:
    """Write each line's name to the right of its last point: (x, y, name, colour) each.

    Names that would touch are moved apart. The y axis must be linear, with its limits already set.
    """
    low, high = axes.get_ylim()
    gap = 0.2 / axes.figure.get_figheight() * (high - low)  # inches of a line of text
    place = low
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        place = max(y, place)
        label = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": color}
        axes.annotate(name, (x, place), (6, 0), **label)
        place += gap


def plain_log(axis: Any) -> None:
    """Make an axis logarithmic, with ticks at 1, 2, 5, 10, ... written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, file: Any, **options: Any) -> None:
    """Save a figure without date or version metadata: the same figures give the same file."""
    metadata = {"Software": None} if options.get("format", "png") == "png" else None
    figure.savefig(file, **{"dpi": _DOTS_PER_INCH, "metadata": metadata} | options)


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file; see :func:`save`."""
    file = io.BytesIO()
    save(figure, file, format="png")
    return file.getvalue()
