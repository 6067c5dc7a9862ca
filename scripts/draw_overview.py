# SPDX-License-Identifier: Apache-2.0
"""Draws docs/overview.png, the gated head on a backbone: ``python scripts/draw_overview.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "overview.png"
FROZEN, TRAINED, OTHER = "#dfe3ea", "#ffd9a8", "#ffffff"


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """A rounded box around (x, y) with a text in it."""
    style = {"boxstyle": "round,pad=0.06", "facecolor": color, "edgecolor": "#444444"}
    height = 0.62
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, **style)
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, with a text at its middle."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#444444"})
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.16)
        axes.text(*middle, text, ha="center", va="center", fontsize=9)


def main() -> None:
    """Draw and write the picture."""
    figure, axes = plt.subplots(figsize=(9.2, 3.1))
    axes.set_xlim(0, 12), axes.set_ylim(0, 4)
    axes.axis("off")
    box(axes, 1.45, 2, 2.2, "backbone\n(frozen)", FROZEN)
    box(axes, 5.4, 3.3, 2.5, "LM head (frozen)", FROZEN)
    box(axes, 5.4, 2, 2.5, "gate (trained)", TRAINED)
    box(axes, 5.4, 0.7, 2.5, "reward head (trained)", TRAINED)
    box(axes, 9.15, 2, 2.1, "$(1 - \\alpha)$ z_LM\n+ $\\alpha$ z_RM", OTHER)
    box(axes, 11.35, 2, 0.9, "token", OTHER)
    arrow(axes, (2.65, 2.15), (4.05, 3.2), "h_t")
    arrow(axes, (2.65, 2), (4.05, 2), "h_1 … h_t")
    arrow(axes, (2.65, 1.85), (4.05, 0.8), "h_t")
    arrow(axes, (6.75, 3.2), (8.0, 2.25), "z_LM")
    arrow(axes, (6.75, 2), (8.0, 2), r"$\alpha$")
    arrow(axes, (6.75, 0.8), (8.0, 1.75), "z_RM")
    arrow(axes, (10.3, 2), (10.8, 2))
    axes.text(
        7.35, 0.02, r"strength s, per request: $\alpha \leftarrow s\,\alpha$", fontsize=9, ha="left"
    )
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
