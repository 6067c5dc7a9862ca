# SPDX-License-Identifier: Apache-2.0
"""The curves of a training run as one picture. Needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..measurement.figure import GREY, PALETTE, bare, blank, headline, plain_log
from .progress import only_ties

# Name in a log -> title of its panel.
_PANELS = {
    "loss": "loss",
    "rewards/accuracies": "share of pairs right (dashed: chance)",
    "gate/mean": "mean alpha",
    "kl": "KL from the backbone, nats per token",
}


def training_figure(
    history: Sequence[dict[str, Any]],
    finding: str,
    held_out: tuple[float, float] | None = None,
    kl: float | None = None,
) -> Any:
    """A matplotlib ``Figure``: a panel each for loss, accuracy, mean alpha and KL over the steps.

    Args:
        history: the trainer's ``state.log_history``.
        finding: the title.
        held_out: accuracy on held-out pairs before and after training.
        kl: KL of the calibrated heads at the end.
    """
    logs = [row for row in history if "loss" in row]
    last = logs[-1]["step"]
    names = [name for name in _PANELS if any(name in row for row in logs)]
    figure = blank(8.0, 6.2)
    for i, name in enumerate(names):
        axes = figure.add_subplot(2, 2, i + 1)
        axes.set_title(_PANELS[name], fontsize=9)
        evaluated = [(r["step"], r[f"eval_{name}"]) for r in history if f"eval_{name}" in r]
        label = "held out"
        shown = [row for row in logs if name in row]
        if name == "rewards/accuracies":
            shown = [row for row in shown if not only_ties(row)]
            axes.axhline(0.5, color=GREY, linestyle="--", linewidth=0.9)
            if held_out is not None:
                evaluated = [(0, held_out[0]), (last, held_out[1])]
        if name == "kl":
            plain_log(axes.yaxis)
            if kl is not None:
                evaluated, label = [(last, kl)], "the heads as saved"
            shown = [row for row in shown if row[name] > 0]
        if name in ("rewards/accuracies", "gate/mean"):
            axes.set_ylim(-0.03, 1.03)
        steps, values = [row["step"] for row in shown], [row[name] for row in shown]
        style = {"color": PALETTE[0], "markersize": 3, "linewidth": 1.3}
        axes.plot(steps, values, "o-", **style, label="training")
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "s", color=PALETTE[1], label=label)
            axes.legend(fontsize=8, frameon=False)
        bare(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    headline(figure, finding, "Over optimizer steps.")
    return figure
