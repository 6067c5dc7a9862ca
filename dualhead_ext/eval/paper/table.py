# SPDX-License-Identifier: Apache-2.0
"""Tables as Markdown and LaTeX, figures as text, and the fields of a run's cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cells import Cell, Store
from .plan import Plan
from .systems import SYSTEMS

NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """A table of text: name, title, note, header and rows."""

    name: str
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """The header and the rows in Markdown."""
        return [
            f"| {' | '.join(self.header)} |",
            "|" + " --- |" * len(self.header),
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]

    def markdown(self) -> str:
        return "\n".join([f"### {self.title}", "", self.note, "", *self.lines()]) + "\n"

    def latex(self) -> str:
        columns = "l" + "r" * (len(self.header) - 1)
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in (self.header, *self.rows)]
        body.insert(1, r"\midrule")
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_escaped(self.title)}. {_escaped(self.note)}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


# --- figures as text ------------------------------------------------------------------------------


def interval(found: Sequence[float] | None, digits: int = 2, factor: float = 1.0) -> str:
    """``value [low, high]``."""
    if found is None:
        return NOT_RUN
    value, low, high = (f"{factor * x:.{digits}f}" for x in found)
    return f"{value} [{low}, {high}]"


def percent(found: Sequence[float] | None) -> str:
    return interval(found, 1, 100.0)


def score(found: Sequence[float] | None) -> str:
    """A reward with more digits, since the rewards of a small reward model are close together."""
    return interval(found, 3)


def number(value: float | None, digits: int = 2) -> str:
    return NOT_RUN if value is None else f"{value:.{digits}f}"


class Results:
    """Access to the fields of cells; None where a cell is missing."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store

    def get(self, cell: Cell | None, name: str) -> Any:
        record = None if cell is None else self.store.record(cell)
        return None if record is None else record["result"].get(name)

    def of(self, place: tuple[str, str, int], cell: str, name: str) -> Any:
        """A field of a system's cell ``decode``, ``texts``, ``reward`` or ``likelihood``."""
        measured = self.plan.systems.get(place)
        return None if measured is None else self.get(getattr(measured, cell), name)

    def label(self, name: str) -> str:
        label = SYSTEMS[name].label
        return (
            label.replace("of n", f"of {self.plan.scale.best_of}") if name == "best_of_n" else label
        )
