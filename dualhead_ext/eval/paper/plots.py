# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: reward and latency, alpha over a response and its histogram, two objectives,
ablations. Each title states the finding with the run's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...measurement.figure import (
    GREY,
    MARKERS,
    PALETTE,
    bare,
    blank,
    end_labels,
    error_bars,
    headline,
    named_rows,
    save,
)
from .plan import MAIN
from .systems import ABLATIONS, GATED, TIMED
from .table import Results

_BACKBONE, _OWN = "backbone", "dual_head"
_ROW_INCHES = 0.3


def _dots(
    axes: Any, names: Sequence[str], values: Sequence[Sequence[float]], own: str, plain: str
) -> None:
    """Draw a row for each ``[value, low, high]``; ``own`` is blue, a line marks ``plain``."""
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        color = PALETTE[0] if name == own else GREY
        axes.errorbar(value[0], i, xerr=error_bars([value]), fmt="o", color=color, capsize=3)
        if name == plain:
            axes.axvline(value[0], color=GREY, linestyle="--", linewidth=0.9)


def _against_the_backbone(
    names: Sequence[str], values: Sequence[Sequence[float]], plain: str, what: str
) -> str:
    """A sentence on the intervals that exclude the backbone's value; without it, on the range."""
    by_name = dict(zip(names, values, strict=True))
    if plain not in by_name:
        middle = [value[0] for value in values]
        return f"{what.capitalize()}: {min(middle):.3g} to {max(middle):.3g}"
    base = by_name.pop(plain)[0]
    if by_name and all(value[0] == base for value in by_name.values()):
        return f"Every system has the backbone's {what}, {base:.3g}"
    above = [name for name, (_, low, _) in by_name.items() if low > base]
    below = [name for name, (_, _, high) in by_name.items() if high < base]
    if not above and not below:
        return f"No system's {what} is apart from the backbone's (95 %)"
    parts = [f"above with {', '.join(above)}"] if above else []
    parts += [f"below with {', '.join(below)}"] if below else []
    return f"{what.capitalize()} is apart from the backbone's: {'; '.join(parts)}"


def frontier(r: Results) -> Any | None:
    """Average reward and milliseconds per token at B = 1, a row for each system, by time."""
    found = {}
    for name in TIMED:
        reward, cost = r.of((MAIN, name, 0), "reward", "reward"), r.get(r.plan.cost, name)
        if reward is not None and cost is not None:
            row = cost["rows"][0]
            found[name] = reward, [row[f"ms_per_token_{n}"] for n in ("median", "q1", "q3")]
    if not found:
        return None
    found = dict(sorted(found.items(), key=lambda item: item[1][1][0]))
    names, values = list(found), [reward for reward, _ in found.values()]
    times = {name: time for name, (_, time) in found.items()}
    labels = [r.label(name) for name in names]
    figure = blank(8.2, 1.7 + _ROW_INCHES * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, names, values, _OWN, _BACKBONE)
    left.set_xlabel("average reward, 95 % interval", fontsize=9)
    named_rows(left, labels)
    colors = [PALETTE[0] if name == _OWN else "0.75" for name in names]
    middle = [time[0] for time in times.values()]
    spread = error_bars(times.values())
    bars = right.barh(range(len(names)), middle, 0.6, xerr=spread, color=colors, ecolor=GREY)
    right.bar_label(bars, [f"{value:.1f}" for value in middle], padding=6, fontsize=8)
    right.set_xlim(0, 1.12 * max(high for _, _, high in times.values()))
    right.set_xlabel("milliseconds per token, B = 1", fontsize=9)
    for axes in (left, right):
        bare(axes, "x")
    finding = _against_the_backbone(labels, values, r.label(_BACKBONE), "average reward")
    if _BACKBONE in times and len(times) > 1:
        base, last = times[_BACKBONE][0], names[-1]
        named = [name for name in dict.fromkeys((_OWN, last)) if name in times]
        costs = ", ".join(f"{r.label(n)} {times[n][0] / base:.1f}" for n in named)
        finding += f". Times as long per token: {costs}"
    headline(figure, finding, "Dashed: the backbone. Bars at the right: quartiles.")
    return figure


def alpha_over_response(r: Results) -> Any | None:
    """The gate by place in the response: mean and quartiles over texts, and single responses."""
    found = {n: r.get(r.plan.gates.get(n), "by_position") for n in (_OWN, "linear_gate")}
    found = {name: places for name, places in found.items() if places}
    if not found:
        return None
    figure = blank(7.4, 4.2)
    axes = figure.add_subplot()
    traces = r.get(r.plan.gates.get(_OWN), "traces") or [] if _OWN in found else []
    longest = max(len(places) for places in found.values())
    for trace in traces:
        axes.plot(trace[:longest], color="0.7", linewidth=0.7)
    parts, ends = [], []
    for color, (name, places) in zip(PALETTE, found.items(), strict=False):
        mean, low, high = zip(*places, strict=True)
        axes.plot(mean, color=color, linewidth=1.8)
        axes.fill_between(range(len(mean)), low, high, color=color, alpha=0.2, linewidth=0)
        ends.append((len(mean) - 1, mean[-1], r.label(name), color))
        parts.append(f"from {mean[0]:.2f} to {mean[-1]:.2f} with {r.label(name)}")
    shown = [max(trace) for trace in traces if trace]
    top = max([*shown, *(high for places in found.values() for _, _, high in places)])
    axes.set(xlabel="token of the response", ylabel="alpha", ylim=(0, min(1.0, 1.1 * top)))
    axes.margins(x=0.02)
    end_labels(axes, ends)
    bare(axes)
    note = "Line and band: mean and quartiles over responses."
    if traces:
        note += f" Grey: {len(traces)} single responses of {r.label(_OWN)}."
    headline(figure, f"Over a response, alpha goes {', '.join(parts)}", note)
    return figure


def alpha_histogram(r: Results) -> Any | None:
    """Histogram of alpha: a row for each gated variant, sorted by mean."""
    found: dict[str, list[float]] = {}
    for name in GATED:
        counts = r.get(r.plan.gates.get(name), "histogram")
        if counts is not None and sum(counts):
            found[name] = [count / sum(counts) for count in counts]
    if not found:
        return None

    def mean(shares: Sequence[float]) -> float:
        return sum(share * (i + 0.5) / len(shares) for i, share in enumerate(shares))

    rows = sorted(found.items(), key=lambda item: mean(item[1]))
    figure = blank(7.4, 1.3 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for i, (name, shares) in enumerate(rows):
        color = PALETTE[0] if name == _OWN else "0.65"
        edges = [k / len(shares) for k in range(len(shares))]
        heights = [0.85 * share for share in shares]  # of one row: the whole row is all tokens
        axes.bar(edges, heights, 1 / len(shares), bottom=i, align="edge", color=color, linewidth=0)
        axes.axhline(i, color="0.85", linewidth=0.8)
        axes.plot(mean(shares), i, marker="^", color="black", markersize=5, clip_on=False)
        axes.text(1.02, i + 0.35, f"mean {mean(shares):.2f}", va="center", fontsize=8)
    axes.set_yticks([i + 0.35 for i in range(len(rows))], [r.label(name) for name, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), ylim=(-0.3, len(rows)), xlabel="alpha")
    bare(axes, None)
    axes.spines["left"].set_visible(False)
    low = sum(mean(shares) < 0.1 for _, shares in rows)
    headline(
        figure,
        f"The mean of alpha is below 0.1 with {low} of {len(rows)} gates, "
        f"and {mean(rows[-1][1]):.2f} at most ({r.label(rows[-1][0])})",
        "Height: the share of tokens in each range of alpha; a row is as high as all of them. "
        "Triangle: the mean.",
    )
    return figure


def two_objectives(r: Results) -> Any | None:
    """Helpful against harmless reward for all weights, and each against the weight."""
    found: dict[str, list[tuple[float, Any, Any]]] = {}
    for (system, weight), cells in r.plan.front.items():
        helpful, harmless = (r.get(cell, "reward") for cell in cells)
        if helpful is not None and harmless is not None:
            found.setdefault(system, []).append((weight, helpful, harmless))
    if not found:
        return None
    figure = blank(9.0, 4.6)
    axes = figure.subplot_mosaic([["front", "helpful"], ["front", "harmless"]])
    for place, name in enumerate(("helpful", "harmless"), start=1):
        for (_, points), color, marker in zip(found.items(), PALETTE, MARKERS, strict=False):
            points = sorted(points)
            weights, values = [p[0] for p in points], [p[place] for p in points]
            axes[name].plot(weights, [v[0] for v in values], f"{marker}-", color=color, ms=4)
            low, high = ([v[i] for v in values] for i in (1, 2))
            axes[name].fill_between(weights, low, high, color=color, alpha=0.15, linewidth=0)
        axes[name].set_ylabel(f"{name} reward", fontsize=9)
        bare(axes[name])
    axes["harmless"].set_xlabel("weight of helpful", fontsize=9)
    parts, within = [], True
    for (system, points), color, marker in zip(found.items(), PALETTE, MARKERS, strict=False):
        points = sorted(points)
        x, y = [p[1][0] for p in points], [p[2][0] for p in points]
        axes["front"].plot(x, y, f"{marker}-", color=color, label=r.label(system), linewidth=1.2)
        for point, offset in ((points[0], (-3, 9)), (points[-1], (8, -3))):
            axes["front"].annotate(
                f"{point[0]:g}",
                (point[1][0], point[2][0]),
                offset,
                textcoords="offset points",
                fontsize=9,
                color=color,
            )
        moves = [(points[0][i], points[-1][i]) for i in (1, 2)]
        change = " and ".join(f"{last[0] - first[0]:+.2f}" for first, last in moves)
        parts.append(f"{change} with {r.label(system)}")
        within &= all(a[1] <= b[0] <= a[2] for a, b in moves)
    axes["front"].set_xlabel("helpful reward", fontsize=9)
    axes["front"].set_ylabel("harmless reward", fontsize=9)
    axes["front"].margins(0.12)
    axes["front"].legend(fontsize=8, frameon=False, loc="upper right")
    bare(axes["front"], "both")
    low, high = (f"{function(p[0] for p in points):g}" for function in (min, max))
    finding = f"From weight {low} to {high}, helpful and harmless change by {', '.join(parts)}"
    if within:
        finding += ": all within the 95 % intervals"
    headline(figure, finding, f"Left: {low} and {high} mark the ends. Bands: 95 % intervals.")
    return figure


def _ablation(field: tuple[str, str], title: str, factor: float) -> Callable[[Results], Any | None]:
    def draw(r: Results) -> Any | None:
        found = {name: r.of((MAIN, name, 0), *field) for name in ABLATIONS}
        there = {name: [factor * x for x in v] for name, v in found.items() if v is not None}
        if not there:
            return None
        figure = blank(7.4, 1.4 + _ROW_INCHES * len(there))
        axes = figure.add_subplot()
        _dots(axes, list(there), list(there.values()), _OWN, _BACKBONE)
        named_rows(axes, [r.label(name) for name in there])
        axes.set_xlabel(f"{title}, 95 % interval", fontsize=9)
        bare(axes, "x")
        labels = [r.label(name) for name in there]
        values, plain = list(there.values()), r.label(_BACKBONE)
        finding = _against_the_backbone(labels, values, plain, title)
        headline(figure, finding, "Dashed: the backbone.")
        return figure

    return draw


# File name: function that draws it; it returns None if nothing was measured.
PLOTS: dict[str, Callable[[Results], Any | None]] = {
    "frontier": frontier,
    "alpha_over_response": alpha_over_response,
    "alpha_histogram": alpha_histogram,
    "two_objectives": two_objectives,
    "ablations_reward": _ablation(("reward", "reward"), "average reward", 1.0),
    "ablations_accuracy": _ablation(("likelihood", "pair_accuracy"), "pair accuracy in %", 100.0),
}


def draw_all(results: Results, out: Path) -> list[Path]:
    """Write each plot that has something to show, as PNG."""
    written = []
    for name, draw in PLOTS.items():
        figure = draw(results)
        if figure is not None:
            written.append(out / f"{name}.png")
            save(figure, written[-1])
    return written
