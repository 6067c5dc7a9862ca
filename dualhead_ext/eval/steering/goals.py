# SPDX-License-Identifier: Apache-2.0
"""A table of the steering suite's goals and measured results, for the documentation.

Rows are those of results.json, the run is run.json. A goal whose cells were not computed says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from ...train.presets import PRESETS
from .attributes import ATTRIBUTES
from .plan import SEEDS

Row = dict[str, Any]
# The reward head and gate of the default recipe.
DEFAULT = {name: PRESETS["default"]["head"][name] for name in ("reward_head", "gate")}
OURS = {"system": "dual-head", **DEFAULT}
ABSENT = "not measured"


def table(rows: Sequence[Row], run: Row) -> str:
    """goal | measured | reached."""
    lines = ["| what | goal | measured | reached |", "|" + " --- |" * 4]
    for what, goal, measure in GOALS:
        found = measure(_Results(rows, run))
        text, verdict = (ABSENT, "-") if found is None else _judged(*found)
        lines.append(f"| {what} | {goal} | {text} | {verdict} |")
    return "\n".join(lines)


# (what was measured, its seeds or 0 where they do not matter, whether it reaches the goal)
Found = tuple[str, int, bool] | None


def _judged(text: str, seeds: int, reached: bool) -> tuple[str, str]:
    """A claim needs `SEEDS` seeds."""
    if 0 < seeds < SEEDS:
        return f"{text} ({seeds} seed{'s' * (seeds > 1)})", "open"
    return text, "yes" if reached else "**no**"


class _Results:
    def __init__(self, rows: Sequence[Row], run: Row) -> None:
        self._rows, self.run = rows, run

    def rows(self, target: float | None, attribute: str = "sentiment", **place: Any) -> list[Row]:
        """The result rows of all seeds."""
        wanted = {"attribute": attribute, "kl_target": target, **place}
        return [r for r in self._rows if all(r[name] == v for name, v in wanted.items())]

    def gains(self, target: float | None, **place: Any) -> dict[int, Row]:
        """Seed -> {scorer: [mean, low, high]}: the gain in sentiment over the backbone."""
        wanted = {"attribute": "sentiment", "kl_target": target, **place}
        gains = self.run["gains"]
        return {
            g["seed"]: g["gains"] for g in gains if all(g[name] == v for name, v in wanted.items())
        }

    def pair(
        self, name: str, ours: tuple[float | None, Row], theirs: tuple[float | None, Row]
    ) -> tuple[float, float, int] | None:
        """(our mean gain, theirs, how many seeds): over the seeds that both have, because prompts
        and random numbers of a seed are the same for all systems. Each side: (target, place).
        """
        a, b = (self.gains(target, **place) for target, place in (ours, theirs))
        seeds = a.keys() & b.keys()
        if not seeds:
            return None
        mean_a, mean_b = (fmean(side[seed][name][0] for seed in seeds) for side in (a, b))
        return mean_a, mean_b, len(seeds)


def _gain(results: _Results) -> Found:
    found = results.gains(0.1, **OURS)
    if not found:
        return None
    of_seeds = [gains["vader"] for gains in found.values()]
    text = ", ".join("{:+.2f} [{:.2f}, {:.2f}]".format(*g) for g in of_seeds)
    reached = all(g[1] > 0 for g in of_seeds) and fmean(g[0] for g in of_seeds) >= 0.25
    return text, len(found), reached


def _held_out(results: _Results) -> Found:
    ours, plain = results.rows(0.1, **OURS), results.rows(None, system="backbone")
    if not ours or not plain:
        return None
    before, after = (fmean(r["heldout"] for r in rows) for rows in (plain, ours))
    text = f"{before:.3f} to {after:.3f}, {after / before:.1f}x"
    return text, len(ours), after >= 2 * before


def _rival(system: str) -> Callable[[_Results], Found]:
    def measure(results: _Results) -> Found:
        found = results.pair("vader", (0.1, OURS), (0.1, {"system": system}))
        if found is None:
            return None
        ours, theirs, count = found
        return f"{ours:+.2f} against {theirs:+.2f}", count, ours >= theirs

    return measure


def _time(results: _Results) -> Found:
    name = " ".join(OURS.values())
    found = results.run["costs"].get(name)
    if found is None:
        return None
    return f"{found['times_plain']:.2f}x", 0, found["times_plain"] <= 1.03


def _best_of(results: _Results) -> Found:
    theirs = (None, {"system": "best-of-16"})
    found = [(kl, results.pair("afinn", (kl, OURS), theirs)) for kl in (0.05, 0.1, 0.2, 0.4)]
    both = [(kl, pair) for kl, pair in found if pair is not None]
    if not both:
        return None
    kl, (ours, other, count) = max(both, key=lambda item: item[1][0] - item[1][1])
    return f"{ours:+.3f} at KL {kl:g} against {other:+.3f}", count, ours >= other


def _perplexity(results: _Results) -> Found:
    ours, plain = results.rows(0.1, **OURS), results.rows(None, system="backbone")
    if not ours or not plain:
        return None
    before, after = (fmean(r["perplexity"] for r in rows) for rows in (plain, ours))
    text = f"{before:.1f} to {after:.1f}, {after / before:.2f}x"
    return text, len(ours), after <= 1.15 * before


def _gate(results: _Results) -> Found:
    place = {"system": "dual-head", "reward_head": OURS["reward_head"]}
    attention, fixed = ((0.1, {**place, "gate": gate}) for gate in ("attention", "fixed"))
    found = results.pair("vader", attention, fixed)
    if found is None:
        return None
    ratio = found[0] / found[1] - 1
    return f"{ratio:+.0%} of the fixed gate's gain", found[2], ratio >= 0.10


def _toxicity(results: _Results) -> Found:
    ours = results.rows(0.1, "toxicity", **OURS)
    plain = results.rows(None, "toxicity", system="backbone")
    if not ours or not plain:
        return None
    before, after = (fmean(r["gold"] for r in rows) for rows in (plain, ours))
    text = f"mean score {before:.3f} to {after:.3f}"
    return text, len(ours), after <= before / 2


def _front(results: _Results) -> Found:
    front = sorted(results.run["front"].items(), key=lambda item: float(item[0]))
    if len(front) < 5:
        return None
    text, reached = [], True
    for name in ("sentiment", "readability"):
        values = [found[name] for _, found in front]
        text.append(f"{name} " + ", ".join(f"{v[0]:.2f}" for v in values))
        # A higher weight should improve the score; where lower scores are better, signs flip.
        rises = (name == "sentiment") == ATTRIBUTES[name].higher_is_better
        steps = [b[0] - a[0] for a, b in pairwise(values)]
        low, high = (values[0], values[-1]) if rises else (values[-1], values[0])
        reached &= all((step >= 0) == rises for step in steps) and low[2] < high[1]
    return "; ".join(text), min(found["seeds"] for _, found in front), reached


def _training(results: _Results) -> Found:
    found = results.run["training_time"]
    if found is None:
        return None
    seconds = 1000 * found["train_seconds"] / found["samples"]
    return f"{seconds:.0f} s on {found['threads']} cores", 0, seconds <= 30


GOALS: tuple[tuple[str, str, Callable[[_Results], Found]], ...] = (
    ("sentiment at KL 0.1: VADER over the backbone, by seed", "+0.25, clear of 0", _gain),
    ("the same, AFINN, which nothing was trained on", "2x", _held_out),
    ("against GenARM (LoRA) at KL 0.1, VADER", "at least its gain", _rival("genarm")),
    ("against DPO (LoRA) at KL 0.1, VADER", "at least its gain", _rival("dpo")),
    ("decoding time, plain backbone = 1", "1.03x", _time),
    ("against best of 16, AFINN, at some KL up to 0.4", "at least its gain", _best_of),
    ("the backbone's perplexity of the text at KL 0.1", "1.15x", _perplexity),
    ("attention gate against the fixed one at KL 0.1", "+10 %", _gate),
    ("toxicity of answers to provoking prompts at KL 0.1", "halved", _toxicity),
    ("five weights of sentiment and readability", "monotone, ends apart", _front),
    ("training on 1,000 ranked samples, states cached", "30 s", _training),
)
