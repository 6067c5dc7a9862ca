# SPDX-License-Identifier: Apache-2.0
"""Tables of the generated texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .plan import MAIN, OTHER
from .systems import BENCHMARKED, HEADLINE, SYSTEMS, WEAK_TO_STRONG
from .table import NOT_RUN, Results, Table, interval, number, percent, score


def _text_row(r: Results, place: tuple[str, str, int]) -> list[str]:
    over = r.plan.over_backbone.get(place)
    wins = [percent(r.get(over, name)) for name in ("win_rate", "length_controlled")]
    return [
        score(r.of(place, "reward", "reward")),
        *(wins if place[1] != "backbone" else ["-", "-"]),
        number(r.of(place, "texts", "diversity")),
        number(r.of(place, "texts", "diversity_without_plus_one")),
        number(r.of(place, "texts", "words"), 1),
        interval(r.of(place, "texts", "coherence")),
    ]


_TEXT_HEADER = (
    "system",
    "average reward",
    "win rate over backbone, %",
    "length-controlled, %",
    "diversity (ARGS)",
    "diversity without +1",
    "words",
    "coherence",
)


def comparison(r: Results) -> Table:
    rows = [
        [r.label(name), *_text_row(r, (MAIN, name, 0))]
        for name in SYSTEMS
        if name not in ("weak_to_strong", "merged")  # a table of its own; decodes as the fixed gate
    ]
    note = (
        "Sampled answers to held-out HH prompts; the judge is a reward model trained on the other "
        "half of the pairs, which guided nobody. Win rates: share of prompts where it scores the "
        "system's answer higher than the backbone's, ties a half. Coherence: cosine of the "
        "backbone's mean hidden states of prompt and answer. 95 % intervals."
    )
    return Table("comparison", "Systems compared: texts", note, _TEXT_HEADER, rows)


def win_rates(r: Results) -> Table:
    rows = []
    for name in SYSTEMS:
        cell = r.plan.under_dual_head.get((MAIN, name, 0))
        if name in ("dual_head", "merged"):
            continue
        counts = [r.get(cell, key) for key in ("wins", "ties", "losses")]
        rows.append(
            [
                r.label(name),
                *(NOT_RUN if count is None else str(count) for count in counts),
                percent(r.get(cell, "win_rate")),
                percent(r.get(cell, "length_controlled")),
            ]
        )
    header = (
        "Dual-Head against",
        "wins",
        "ties",
        "losses",
        "win rate, %",
        "length-controlled, %",
    )
    note = "Of Dual-Head (logits mix), by the same judge on the same prompts."
    return Table("win_rates", "Win rates of Dual-Head", note, header, rows)


def transfer(r: Results) -> Table:
    rows = [[r.label(name), *_text_row(r, (MAIN, name, 0))] for name in WEAK_TO_STRONG]
    note = (
        "All decode with the larger backbone: alone, guided by the heads that were trained on the "
        "smaller one, with heads trained on itself, and tuned itself."
    )
    return Table("weak_to_strong", "Weak to strong", note, _TEXT_HEADER, rows)


def architectures(r: Results) -> Table:
    rows = [[r.label(name), *_text_row(r, (OTHER, name, 0))] for name in HEADLINE]
    note = "The headline systems on the backbone of the other architecture, same data and judge."
    return Table("architectures", "Another architecture", note, _TEXT_HEADER, rows)


def front(r: Results) -> Table:
    rows = [
        [
            r.label(name),
            f"{weight:g} / {1 - weight:g}",
            score(r.get(helpful, "reward")),
            score(r.get(harmless, "reward")),
        ]
        for (name, weight), (helpful, harmless) in r.plan.front.items()
    ]
    header = ("system", "weights helpful / harmless", "helpful reward", "harmless reward")
    note = (
        "One gated head with two reward heads; GenARM with two reward models. Scored by two reward "
        "models that guided nobody, each trained on one subset of the other half of the pairs."
    )
    return Table("front", "Two objectives", note, header, rows)


def questions(r: Results) -> Table:
    rows = []
    for name in BENCHMARKED:
        reward, compared = r.plan.mt_bench.get(name, (None, None))
        rows.append(
            [
                r.label(name),
                percent(r.get(r.plan.truthfulqa.get(name), "mc1")),
                percent(r.get(r.plan.truthfulqa.get(name), "mc2")),
                score(r.get(reward, "reward")),
                "-" if name == "backbone" else percent(r.get(compared, "win_rate")),
            ]
        )
    header = (
        "system",
        "TruthfulQA MC1, %",
        "MC2, %",
        "MT-Bench reward",
        "win rate over backbone, %",
    )
    note = "MT-Bench: both turns, the second after the system's own first answer; same judge."
    return Table("questions", "TruthfulQA and MT-Bench", note, header, rows)


Find = Callable[[tuple[str, str, int]], Sequence[float] | None]


def _by_seed(
    r: Results, names: Sequence[str], find: Find, digits: int, factor: float
) -> tuple[list[str], list]:
    """Header and rows of ``find``'s (value, low, high) for each system, by seed."""
    rows = []
    for backbone in (MAIN, OTHER):
        for name in names:
            found = [find((backbone, name, seed)) for seed in range(r.plan.seeds)]
            there = [f"{factor * x[0]:.{digits}f}" for x in found if x is not None]
            spread = f"{min(there, key=float)} to {max(there, key=float)}" if there else NOT_RUN
            values = (interval(x, digits, factor) for x in found)
            rows.append([r.label(name), backbone, *values, spread])
    return ["system", "backbone", *(f"seed {s}" for s in range(r.plan.seeds)), "range"], rows


def seeds(r: Results) -> Table:
    header, rows = _by_seed(r, HEADLINE, lambda place: r.of(place, "reward", "reward"), 3, 1.0)
    note = "Average reward by seed of training and sampling; the judge is the same."
    return Table("seeds", "Seeds", note, header, rows)


def seed_win_rates(r: Results) -> Table:
    def find(place: tuple[str, str, int]) -> Sequence[float] | None:
        return r.get(r.plan.over_backbone.get(place), "length_controlled")

    names = [name for name in HEADLINE if name != "backbone"]
    header, rows = _by_seed(r, names, find, 1, 100.0)
    note = "Length-controlled win rate over the backbone's answers of the same seed, %."
    return Table("seed_win_rates", "Seeds: win rates", note, header, rows)
