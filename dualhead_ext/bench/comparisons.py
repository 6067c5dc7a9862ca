# SPDX-License-Identifier: Apache-2.0
"""A contender's cost relative to another's, and its upper limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..measurement.timing import Timing, ratio


@dataclass(frozen=True)
class Comparison:
    """A contender's cost as a multiple of another's.

    Attributes:
        what: the cost that is compared: "time", "memory" or "bytes".
        over: the contender whose cost is 1; None if ``value`` is an absolute number.
        value, low, high: the ratio and its 95 % interval.
        goal: upper limit of ``value``; None if there is none.
    """

    what: str
    over: str | None
    value: float
    low: float
    high: float
    goal: float | None = None

    @classmethod
    def exact(cls, what: str, over: str | None, value: float, goal: float | None) -> Comparison:
        """A comparison of exact numbers, without an interval."""
        return cls(what, over, value, value, value, goal)

    @classmethod
    def of_times(cls, slower: Timing, faster: Timing, goal: float | None = None) -> Comparison:
        """A comparison of two timings from the same rounds."""
        found = ratio(slower, faster)
        return cls("time", faster.name, found.value, found.low, found.high, goal)

    @property
    def outcome(self) -> str:
        """ "reached", "missed", or "within the spread" if only the interval's low end reaches the
        goal; "" without a goal.
        """
        if self.goal is None:
            return ""
        if self.value <= self.goal:
            return "reached"
        return "within the spread" if self.low <= self.goal else "missed"

    def as_row(self) -> dict[str, Any]:
        """A plain dict for results files."""
        return {**asdict(self), "outcome": self.outcome}


@dataclass(frozen=True)
class Contest:
    """The results of all contenders in one setting.

    Attributes:
        measure: what was measured: "step", "model", "loss" or "file".
        setting: name -> value of the parameters that identify the setting.
        figures: contender -> its figures.
        comparisons: contender -> its comparisons.
    """

    measure: str
    setting: dict[str, Any]
    figures: dict[str, dict[str, Any]]
    comparisons: dict[str, list[Comparison]]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files store them."""
        return [
            {
                "measure": self.measure,
                **self.setting,
                "contender": name,
                **figures,
                "comparisons": [found.as_row() for found in self.comparisons.get(name, [])],
            }
            for name, figures in self.figures.items()
        ]

    def failures(self) -> list[str]:
        """A sentence for each goal that is missed by more than the spread."""
        return [
            f"{self}: {name}: {sentence(found.as_row())}"
            for name, several in self.comparisons.items()
            for found in several
            if found.outcome == "missed"
        ]

    def text(self) -> str:
        """The rows as text for a terminal."""
        lines = [f"\n{self}"]
        for name, figures in self.figures.items():
            found = [sentence(c.as_row()) for c in self.comparisons.get(name, [])]
            lines.append(f"    {name:<22} {shown(figures)}" + "".join(f"; {s}" for s in found if s))
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.measure}, {setting(self.setting)}"


def times(timings: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    """The timing figures of each contender."""
    return {
        name: {
            "us_median": timing.us_median,
            "us_q1": timing.us_q1,
            "us_q3": timing.us_q3,
            "repeats": timing.repeats,
        }
        for name, timing in timings.items()
    }


_SHOWN: dict[str, Callable[[Any], str]] = {
    "us_median": lambda us: f"{us / 1e3:.3f} ms",
    "tokens_per_s_median": lambda rate: f"{rate:.1f} tokens/s",
    "extra_bytes": lambda count: f"{count / 1e6:.1f} MB",
    "bytes": lambda count: f"{count / 1e6:.3f} MB",
}


def shown(figures: dict[str, Any]) -> str:
    """A row's main figures as text."""
    return ", ".join(show(figures[name]) for name, show in _SHOWN.items() if name in figures)


def setting(values: dict[str, Any]) -> str:
    """The parameters of a setting as text."""
    return ", ".join(v if isinstance(v, str) else f"{n} = {v}" for n, v in values.items())


def sentence(found: dict[str, Any]) -> str:
    """A comparison from a results file as text; "" where nothing is compared."""
    words = []
    if found["over"] is not None:
        words.append(f"{found['value']:.3f} of the {found['what']} of {found['over']}")
        if found["low"] != found["high"]:
            words[0] += f" ({found['low']:.3f}..{found['high']:.3f})"
    if found["goal"] is not None:
        words.append(f"goal at most {found['goal']:.4g}: {found['outcome']}")
    return ", ".join(words)
