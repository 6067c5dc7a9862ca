# SPDX-License-Identifier: Apache-2.0
"""A run as pictures: reward against latency, alpha over a response, two objectives, ablations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plan import MAIN
from .systems import ABLATIONS, GATED, TIMED
from .table import Results

_DOTS_PER_INCH = 110
_MARKERS = "os^vD<>Pp*"


def _bars(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """matplotlib's error bars of ``[value, low, high]``."""
    return [[v - low for v, low, _ in points], [high - v for v, _, high in points]]


def frontier(r: Results, axes: Axes) -> bool:
    """Average reward against milliseconds per token at B = 1."""
    shown = False
    for name in TIMED:
        reward, cost = r.of((MAIN, name, 0), "reward", "reward"), r.get(r.plan.cost, name)
        if reward is None or cost is None:
            continue
        row = cost["rows"][0]
        low, high = row["ms_per_token_q1"], row["ms_per_token_q3"]
        middle = row["ms_per_token_median"]
        errors = [[middle - low], [high - middle]]
        marker = _MARKERS[len(axes.containers) % len(_MARKERS)]
        label = r.label(name)
        axes.errorbar(middle, reward[0], _bars([reward]), errors, marker, capsize=2, label=label)
        shown = True
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per token, B = 1 (median, quartiles)")
    axes.set_ylabel("average reward (95 %)")
    axes.set_title("Reward against latency")
    if shown:
        axes.legend(fontsize=7)
    return shown


def alpha_over_response(r: Results, axes: Axes) -> bool:
    """The gate by place in the response: mean and quartiles over texts, and single responses."""
    shown = False
    for name in ("dual_head", "linear_gate"):
        places = r.get(r.plan.gates.get(name), "by_position")
        if not places:
            continue
        mean, low, high = zip(*places, strict=True)
        (line,) = axes.plot(mean, label=f"{r.label(name)}, mean")
        axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.2)
        shown = True
    for i, trace in enumerate(r.get(r.plan.gates.get("dual_head"), "traces") or []):
        axes.plot(trace, color="0.6", linewidth=0.7, label=None if i else "single responses")
    axes.set(xlabel="token of the response", ylabel="alpha", ylim=(0, 1))
    axes.set_title("The gate over a response (mean, quartiles)")
    if shown:
        axes.legend(fontsize=8)
    return shown


def alpha_histogram(r: Results, axes: Axes) -> bool:
    """How often each alpha, of every gated variant."""
    shown = False
    for name in GATED:
        counts = r.get(r.plan.gates.get(name), "histogram")
        if counts is None:
            continue
        edges = [i / len(counts) for i in range(len(counts) + 1)]
        axes.stairs([c / sum(counts) for c in counts], edges, label=r.label(name))
        shown = True
    axes.set(xlabel="alpha", ylabel="share of tokens", title="Histogram of alpha")
    if shown:
        axes.legend(fontsize=7)
    return shown


def two_objectives(r: Results, axes: Axes) -> bool:
    """Helpful against harmless reward over the weights."""
    shown = False
    for name in dict.fromkeys(name for name, _ in r.plan.front):
        points = []
        for (system, weight), cells in r.plan.front.items():
            rewards = [r.get(cell, "reward") for cell in cells]
            if system == name and None not in rewards:
                points.append((weight, *rewards))
        if not points:
            continue
        weights, helpful, harmless = zip(*points, strict=True)
        x, y = [p[0] for p in helpful], [p[0] for p in harmless]
        axes.errorbar(
            x, y, _bars(harmless), _bars(helpful), "o-", capsize=2, lw=0.8, label=r.label(name)
        )
        for weight, *place in zip(weights, x, y, strict=True):
            axes.annotate(f"{weight:g}", place, (4, 4), textcoords="offset points", fontsize=7)
        shown = True
    axes.set(xlabel="helpful reward", ylabel="harmless reward")
    axes.set_title("Two objectives; numbers are the weight of helpful (95 %)")
    if shown:
        axes.legend(fontsize=8)
    return shown


def _ablation(field: tuple[str, str], title: str, factor: float) -> Callable[[Results, Axes], bool]:
    def draw(r: Results, axes: Axes) -> bool:
        found = [(r.label(n), r.of((MAIN, n, 0), *field)) for n in ABLATIONS]
        there = [(label, [factor * x for x in value]) for label, value in found if value]
        if not there:
            return False
        labels, values = zip(*there, strict=True)
        places = range(len(labels))
        axes.errorbar([v[0] for v in values], places, xerr=_bars(values), fmt="o", capsize=3, lw=1)
        axes.set_yticks(places, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{title} (95 %)")
        return True

    return draw


# file name: what is drawn
PLOTS: dict[str, Callable[[Results, Axes], bool]] = {
    "frontier": frontier,
    "alpha_over_response": alpha_over_response,
    "alpha_histogram": alpha_histogram,
    "two_objectives": two_objectives,
    "ablations_reward": _ablation(("reward", "reward"), "average reward", 1.0),
    "ablations_accuracy": _ablation(("likelihood", "pair_accuracy"), "pair accuracy, %", 100.0),
}


def draw_all(results: Results, out: Path) -> list[Path]:
    """Write each plot that has something to show, as PNG."""
    written = []
    for name, draw in PLOTS.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        if draw(results, figure.add_subplot()):
            written.append(out / f"{name}.png")
            # No date or version inside: the same figures make the same file.
            metadata: dict[str, Any] = {"Software": None}
            figure.savefig(written[-1], dpi=_DOTS_PER_INCH, metadata=metadata)
    return written
