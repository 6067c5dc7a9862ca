# SPDX-License-Identifier: Apache-2.0
"""The curves of a training run as one picture. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "0.45"  # of Okabe and Ito: distinct to everybody
# Name in a log -> title of its panel.
_PANELS = {
    "loss": "loss",
    "rewards/accuracies": "share of pairs right",
    "gate/mean": "mean alpha",
    "kl": "KL from the backbone, nats per token (log scale)",
}


def training_png(
    history: Sequence[dict[str, Any]],
    finding: str,
    held_out: tuple[float, float] | None = None,
    kl: float | None = None,
) -> bytes:
    """A panel each for loss, accuracy, mean alpha and KL over the steps.

    Args:
        history: the trainer's ``state.log_history``. finding: what it says, the title.
        held_out: accuracy on held-out pairs before and after. kl: at the end, of the calibrated
            heads.
    """
    logs = [row for row in history if "loss" in row]
    names = [name for name in _PANELS if any(name in row for row in logs)]
    figure = Figure(figsize=(8.0, 6.2), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(2, 2, i + 1)
        points = [(row["step"], row[name]) for row in logs if name in row]
        if name == "kl":
            axes.set_yscale("log", nonpositive="mask")
        axes.plot(*zip(*points, strict=True), "o-", color=_BLUE, markersize=3, linewidth=1.3,
                  label="training")  # fmt: skip
        evaluated = [(r["step"], r[f"eval_{name}"]) for r in history if f"eval_{name}" in r]
        _panel(axes, _PANELS[name])
        if name in ("rewards/accuracies", "gate/mean"):
            axes.set_ylim(-0.03, 1.03)
        if name == "rewards/accuracies":
            axes.axhline(0.5, color=_GREY, linestyle="--", linewidth=0.9)
            if held_out is not None:
                evaluated = [(0, held_out[0]), (points[-1][0], held_out[1])]
        label = "held out"
        if name == "kl" and kl is not None:
            evaluated, label = [(points[-1][0], kl)], "the heads as saved"
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "s", color=_ORANGE, label=label)
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle(textwrap.fill(finding, 76), fontsize=11, fontweight="bold")
    figure.supxlabel("optimizer step", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="0.9")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
