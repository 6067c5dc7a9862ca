# SPDX-License-Identifier: Apache-2.0
"""Update the documentation of the steering suite from its committed results.

    python benchmarks/steering.py

Writes docs/steering.png, and the text between ``<!-- steering -->`` and ``<!-- /steering -->`` in
README.md, docs/results.md and docs/training.md.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dualhead_ext.eval.steering import goals, report
from dualhead_ext.eval.steering.attributes import ATTRIBUTES
from dualhead_ext.measurement.figure import GREY, PALETTE, bare, blank, headline, save

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "steering" / "results.json"
PICTURE = ROOT / "docs" / "steering.png"
_OWN, _GENARM, _DPO = PALETTE[0], PALETTE[1], PALETTE[2]
# {(system, reward head, gate): (name, marker, colour)}, in the order of the legend. Other systems
# are only in the table. The project's own systems are blue and differ by the marker.
SHOWN = {
    ("dual-head", "embedding", "fixed"): ("Dual-Head, fixed gate", "o-", _OWN),
    ("dual-head", "embedding", "linear"): ("Dual-Head, linear gate", "s--", _OWN),
    ("dual-head", "embedding", "attention"): ("Dual-Head, attention gate", "^:", _OWN),
    ("genarm", None, None): ("GenARM (two models)", "v-", _GENARM),
    ("dpo", None, None): ("DPO", "D-", _DPO),
    ("paper", "full", "attention"): ("the paper's objective", "x-", PALETTE[3]),
    ("best-of-4", None, None): ("best of 4 samples", "P", PALETTE[4]),
    ("best-of-16", None, None): ("best of 16 samples", "*", PALETTE[5]),
}
_BACKBONE = ("backbone", None, None)
_NEAR = 0.1  # nats per token at which the plot's title compares the systems
Point = tuple[float, float, float, float]


def _groups(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """{system and target: the rows of its seeds}."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        place = (row["system"], row["reward_head"], row["gate"])
        groups[(*place, row["kl_target"])].append(row)
    return groups


def points_of(rows: list[dict[str, Any]]) -> dict[tuple, list[Point]]:
    """{system: (kl, value, low, high)}, means over seeds, by increasing KL."""
    groups = _groups(rows)
    found: dict[tuple, list[Point]] = defaultdict(list)
    for (*place, _), same in groups.items():
        low, high = (fmean(row["gold_ci95"][i] for row in same) for i in (0, 1))
        kl, gold = (fmean(row[name] for row in same) for name in ("kl", "gold"))
        found[tuple(place)].append((kl, gold, low, high))
    return {place: sorted(points) for place, points in found.items()}


def held_out_of(rows: list[dict[str, Any]]) -> dict[tuple, list[tuple[float, float]]]:
    """{system: (kl, held-out score)}, means over seeds."""
    groups = _groups(rows)
    found: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for (*place, _), same in groups.items():
        kl, score = (fmean(row[name] for row in same) for name in ("kl", "heldout"))
        found[tuple(place)].append((kl, score))
    return {place: sorted(points) for place, points in found.items()}


def finding(rows: list[dict[str, Any]]) -> str:
    """The sentence about the effect of Dual-Head near 0.1 nats per token, by both scorers."""
    gold, held_out = points_of(rows), held_out_of(rows)
    own = next(place for place in SHOWN if place in gold)
    at = min(range(len(gold[own])), key=lambda i: abs(gold[own][i][0] - _NEAR))
    kl, value, *_ = gold[own][at]
    start, other = gold[_BACKBONE][0][1], held_out[_BACKBONE][0][1]
    return (
        f"{SHOWN[own][0]}: {kl:.2f} nats per token move sentiment from {start:.2f} to {value:.2f} "
        f"by VADER, and from {other:.2f} to {held_out[own][at][1]:.2f} by AFINN, which nothing was "
        "trained on"
    )


def picture(rows: list[dict[str, Any]]) -> Any:
    """Two plots: by the scorer that ranked the training data, and by a held-out scorer."""
    gold, held_out = points_of(rows), held_out_of(rows)
    figure = blank(9.0, 4.4)
    left, right = figure.subplots(1, 2)
    for place, (label, style, color) in SHOWN.items():
        if place not in gold:
            continue
        lines = len(style) > 1  # a line from the backbone, unless the system is a single point
        start = [(0.0, *gold[_BACKBONE][0][1:])] if lines else []
        kl, value, low, high = zip(*[*start, *gold[place]], strict=True)
        left.plot(kl, value, style, label=label, color=color, markersize=5, linewidth=1.4)
        if lines:
            left.fill_between(kl, low, high, color=color, alpha=0.1, linewidth=0)
        start = [(0.0, held_out[_BACKBONE][0][1])] if lines else []
        kl, score = zip(*[*start, *held_out[place]], strict=True)
        right.plot(kl, score, style, color=color, markersize=5, linewidth=1.4)
    for axes, values, name in (
        (left, gold, "VADER, trained on"),
        (right, held_out, "AFINN, held out"),
    ):
        axes.set_title(f"sentiment: {name}", fontsize=9)
        axes.set_xlabel("KL from the backbone, nats per token", fontsize=9)
        axes.axhline(values[_BACKBONE][0][1], color=GREY, linestyle="--", linewidth=0.9)
        bare(axes)
    left.legend(fontsize=8, frameon=False)
    note = "Dashed: the backbone. Means over seeds; bands: 95 % intervals, likewise."
    headline(figure, finding(rows), note)
    return figure


# --- tables ---------------------------------------------------------------------------------------

_NAMES = {
    "backbone": "the backbone alone",
    "dual-head": "Dual-Head",
    "paper": "the paper's head and objective",
    "genarm": "GenARM (LoRA)",
    "dpo": "DPO (LoRA)",
    "args": "ARGS",
    "best-of-4": "best of 4 samples",
    "best-of-16": "best of 16 samples",
}


def name_of(row: dict[str, Any]) -> str:
    """A system's name in the documentation."""
    parts = [row["reward_head"], row["gate"] and f"{row['gate']} gate"]
    own = row["system"] == "dual-head"
    detail = ", ".join(filter(None, parts))
    return f"{_NAMES[row['system']]} ({detail})" if own else _NAMES[row["system"]]


def table(rows: list[dict[str, Any]], attribute: str, target: float | None = None) -> str:
    """A table with a row for each system at one target, or at all targets if it is None.

    Systems without a target are always included. Values are means over seeds.
    """
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["attribute"] == attribute and (target is None or row["kl_target"] in (None, target)):
            groups[name_of(row), row["kl_target"]].append(row)
    lines = [
        "| system | KL, nats per token | gold score [95 %] | seeds | held-out score | perplexity | "
        "words | trained parameters | training, s |",
        "|" + " --- |" * 9,
    ]
    for (name, _), same in sorted(groups.items(), key=lambda item: fmean_of(item[1], "kl")):
        low, high = (fmean(row["gold_ci95"][i] for row in same) for i in (0, 1))
        seeds = ", ".join(f"{row['gold']:.2f}" for row in sorted(same, key=lambda r: r["seed"]))
        trained = same[0]["train_seconds"] is not None
        lines.append(
            f"| {name} | {fmean_of(same, 'kl'):.3f} | {fmean_of(same, 'gold'):.3f} "
            f"[{low:.3f}, {high:.3f}] | {seeds} | {fmean_of(same, 'heldout'):.3f} | "
            f"{fmean_of(same, 'perplexity'):.1f} | {fmean_of(same, 'words'):.1f} | "
            f"{same[0]['parameters']:,} | "
            + (f"{fmean_of(same, 'train_seconds'):.1f} |" if trained else "- |")
        )
    return "\n".join(lines)


def other_attributes(rows: list[dict[str, Any]], target: float) -> str:
    """attribute | gold and held-out score of the backbone and of the default head at ``target``."""
    lines = [
        "| attribute | gold scorer | backbone | steered [95 %] | held out | backbone | steered | "
        "seeds |",
        "|" + " --- |" * 8,
    ]
    for name, attribute in ATTRIBUTES.items():
        of = [row for row in rows if row["attribute"] == name]
        plain = [row for row in of if row["system"] == "backbone"]
        place = goals.OURS | {"kl_target": target}
        ours = [row for row in of if all(row[key] == value for key, value in place.items())]
        if name == "sentiment" or not plain or not ours:
            continue
        low, high = (fmean(row["gold_ci95"][i] for row in ours) for i in (0, 1))
        lines.append(
            f"| {name} | {attribute.gold} | {fmean_of(plain, 'gold'):.3f} | "
            f"{fmean_of(ours, 'gold'):.3f} [{low:.3f}, {high:.3f}] | {attribute.heldout[0]} | "
            f"{fmean_of(plain, 'heldout'):.3f} | {fmean_of(ours, 'heldout'):.3f} | {len(ours)} |"
        )
    return "\n".join(lines)


def fmean_of(rows: list[dict[str, Any]], name: str) -> float:
    """The mean of a field over the rows."""
    return fmean(row[name] for row in rows)


def blocks(rows: list[dict[str, Any]], run: dict[str, Any]) -> dict[Path, str]:
    """{document: text between its markers}."""
    targets = [row["kl_target"] for row in rows if row["kl_target"] is not None]
    first = min(targets, key=lambda t: abs(t - 0.1)) if targets else None
    # The other reward heads are compared in docs/results.md.
    headline = [
        row for row in rows if row["system"] != "dual-head" or row["reward_head"] == "embedding"
    ]
    return {
        ROOT / "README.md": table(headline, "sentiment", first),
        ROOT / "docs" / "results.md": "\n\n".join(
            (table(rows, "sentiment"), goals.table(rows, run), other_attributes(rows, _NEAR))
        ),
        ROOT / "docs" / "training.md": "\n".join(report.sizes(run).lines()),
    }


def filled(document: str, block: str) -> str:
    """The document with the block between its markers.

    Raises:
        ValueError: the document has no markers.
    """
    begin, end = "<!-- steering -->\n", "<!-- /steering -->"
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"filled: the document must have {begin.strip()} and {end}")
    return f"{head}{begin}{block}\n{end}{tail}"


def main() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    run = json.loads(RESULTS.with_name("run.json").read_text(encoding="utf-8"))
    save(picture([row for row in rows if row["attribute"] == "sentiment"]), PICTURE)
    for path, block in blocks(rows, run).items():
        path.write_text(filled(path.read_text(encoding="utf-8"), block), encoding="utf-8")


if __name__ == "__main__":
    main()
