# SPDX-License-Identifier: Apache-2.0
"""The output of a run: all records in one file, tables in Markdown and LaTeX, plots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import model_tables, text_tables
from .cells import Cell, Store, unfolded
from .plan import Plan
from .table import NOT_RUN, Results, Table

TABLES: tuple[Callable[[Results], Table], ...] = (
    text_tables.comparison,
    text_tables.win_rates,
    model_tables.likelihoods,
    model_tables.ablations,
    model_tables.sweep,
    model_tables.costs,
    text_tables.front,
    text_tables.transfer,
    text_tables.architectures,
    model_tables.judges,
    text_tables.questions,
    text_tables.seeds,
    text_tables.seed_win_rates,
)
RESULTS = "results.json"


def write(plan: Plan, store: Store, scale: str) -> list[Path]:
    """Write everything into the run's folder.

    Raises:
        ImportError: matplotlib (the extra ``plot``) is not installed.
    """
    from . import plots  # matplotlib is needed for this alone

    results = Results(plan, store)
    tables = [make(results) for make in TABLES]
    records = [store.record(cell) for cell in unfolded(plan.cells())]
    done = [record for record in records if record is not None]
    texts = {
        RESULTS: json.dumps({"scale": scale, "cells": done}, indent=1, allow_nan=False) + "\n",
        "tables.md": markdown(plan, store, scale, tables),
        "tables.tex": "\n\n".join(table.latex() for table in tables) + "\n",
    }
    for name, text in texts.items():
        (store.out / name).write_text(text, encoding="utf-8")
    return [*(store.out / name for name in texts), *plots.draw_all(results, store.out)]


def restore(store: Store) -> None:
    """Add the cells that are only in the folder's results file, so that a run can resume from that
    file alone. Models are trained again if a remaining cell reads them.

    Raises:
        ValueError: the file is not a results file.
    """
    path = store.out / RESULTS
    if not path.is_file():
        return
    try:
        records = list(json.loads(path.read_text(encoding="utf-8"))["cells"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"suite: {path} must be a results file; remove it to start") from error
    for record in records:
        store.keep(record)


def markdown(plan: Plan, store: Store, scale: str, tables: list[Table]) -> str:
    """All tables as Markdown, preceded by a description of the run."""
    records = [store.record(cell) for cell in unfolded(plan.cells())]
    done = [record for record in records if record is not None]
    lines = [f"## Scale {scale}", "", _provenance(done, len(records)), ""]
    lines += [f"{line}\n" for line in other_weights(plan.cells(), store)]
    if plan.without:
        lines.append(f"Left out by the command (shown as {NOT_RUN}): {', '.join(plan.without)}.\n")
    return "\n".join([*lines, *(table.markdown() for table in tables)])


def _provenance(done: list[dict[str, Any]], count: int) -> str:
    trained = sum(r["seconds"] for r in done if r["step"] != "pretrain") / 60
    backbones = sum(r["seconds"] for r in done if r["step"] == "pretrain") / 60
    where = Counter(
        (e["device"], e["cores"], e["commit"], e["torch"]) for e in (r["environment"] for r in done)
    )
    machines = "; ".join(
        f"{device}, {cores} cores, commit {commit}, torch {torch} ({cells} cells)"
        for (device, cores, commit, torch), cells in where.most_common()
    )
    return (
        f"{len(done)} of {count} cells; {trained:.0f} minutes without the backbones, which took "
        f"{backbones:.0f}. Machine: {machines or 'none'}."
    )


def other_weights(cells: list[Cell], store: Store) -> list[str]:
    """Warnings about cells computed from weights that were later trained again and changed: their
    figures and those of later cells are from different trainings.
    """
    found = []
    for cell in unfolded(cells):
        record = store.record(cell)
        for role, weights in (record or {}).get("weights", {}).items():
            now = store.record(cell.needs[role])
            if now is not None and now["result"].get("weights") != weights:
                found.append(f"{cell.label} was computed with other weights of {role} than others.")
    return found
