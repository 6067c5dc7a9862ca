# SPDX-License-Identifier: Apache-2.0
"""What a contender costs beside another one, and the most that it may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..measurement.timing import Timing, ratio


@dataclass(frozen=True)
class Comparison:
    """A cost as a multiple of another one.

    Attributes:
        what: is compared: "time", "memory" or "bytes".
        over: the contender whose cost is 1; None: ``value`` is the number itself.
        value, low, high: the ratio and its 95 % interval.
        goal: the most that ``value`` should be; None: it is measured only.
    """

    what: str
    over: str | None
    value: float
    low: float
    high: float
    goal: float | None = None

    @classmethod
    def exact(cls, what: str, over: str | None, value: float, goal: float | None) -> Comparison:
        """Of a number without a spread."""
        return cls(what, over, value, value, value, goal)

    @classmethod
    def of_times(cls, slower: Timing, faster: Timing, goal: float | None = None) -> Comparison:
        """Of two timings from the same rounds."""
        found = ratio(slower, faster)
        return cls("time", faster.name, found.value, found.low, found.high, goal)

    @property
    def outcome(self) -> str:
        """ "reached", "missed", or "within the spread" where the interval alone reaches the goal;
        "" without a goal.
        """
        if self.goal is None:
            return ""
        if self.value <= self.goal:
            return "reached"
        return "within the spread" if self.low <= self.goal else "missed"

    def as_row(self) -> dict[str, Any]:
        """For results files."""
        return {**asdict(self), "outcome": self.outcome}


@dataclass(frozen=True)
class Contest:
    """Contenders of one setting, and what is compared.

    Attributes:
        measure: what was measured: "step", "model", "loss" or "file".
        setting: what tells it from others.
        rows: by contender, its figures.
        comparisons: by contender.
    """

    measure: str
    setting: dict[str, Any]
    figures: dict[str, dict[str, Any]]
    comparisons: dict[str, list[Comparison]]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files have them."""
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
        """A sentence for each goal that is missed beyond the spread."""
        return [
            f"{self}: {name}: {sentence(found.as_row())}"
            for name, several in self.comparisons.items()
            for found in several
            if found.outcome == "missed"
        ]

    def text(self) -> str:
        """The rows for a terminal."""
        lines = [f"\n{self}"]
        for name, figures in self.figures.items():
            found = [sentence(c.as_row()) for c in self.comparisons.get(name, [])]
            lines.append(f"    {name:<22} {shown(figures)}" + "".join(f"; {s}" for s in found if s))
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.measure}, {setting(self.setting)}"


def times(timings: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    """The figures of timed contenders."""
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
    """Figures of a row that a person reads first."""
    return ", ".join(show(figures[name]) for name, show in _SHOWN.items() if name in figures)


def setting(values: dict[str, Any]) -> str:
    """What tells a row from others, in words."""
    return ", ".join(v if isinstance(v, str) else f"{n} = {v}" for n, v in values.items())


def sentence(found: dict[str, Any]) -> str:
    """A comparison of a results file in words; "" where nothing is compared."""
    words = []
    if found["over"] is not None:
        words.append(f"{found['value']:.3f} of the {found['what']} of {found['over']}")
        if found["low"] != found["high"]:
            words[0] += f" ({found['low']:.3f}..{found['high']:.3f})"
    if found["goal"] is not None:
        words.append(f"goal at most {found['goal']:.4g}: {found['outcome']}")
    return ", ".join(words)
