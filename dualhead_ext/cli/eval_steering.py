# SPDX-License-Identifier: Apache-2.0
"""``dualhead eval --suite steering``: compute the missing cells, and write the report."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..eval.paper.cells import Cell, Store, pending
from ..eval.scorers import scorer
from ..eval.steering import report
from ..eval.steering.attributes import ATTRIBUTES, PROVOKING, prompts_of
from ..eval.steering.plan import KL_TARGETS, NAMES, SEEDS, SIZES, VARIANTS, Plan, Planner
from ..eval.steering.steps import STEPS, Resources
from .errors import UserError, argument
from .eval_suite import EXIT_LEFT, compute

# Expected seconds of a cell on two idle cores of a small server, used until the run has finished
# cells of that kind. Samples are estimated by the number of responses.
_EXPECTED = {"train": 120.0, "decode": 90.0, "cost": 60.0, "training_time": 150.0}
_EXPECTED_RESPONSE = 0.25


def main(arguments: Namespace) -> int:
    """Run, write the report, and print its path. Returns EXIT_LEFT if cells are left.

    Raises:
        UserError: an unknown attribute or system, or missing packages or data.
    """
    with argument():
        attributes = arguments.attributes or list(ATTRIBUTES)
        if unknown := sorted(set(attributes) - set(ATTRIBUTES)):
            raise UserError(
                f"--attributes: expected some of {', '.join(ATTRIBUTES)}, got {unknown[0]!r}"
            )
        targets = arguments.kl or list(KL_TARGETS)
        if any(target <= 0 for target in targets):
            raise UserError(f"--kl: expected numbers above 0, got {min(targets):g}")
        size = SIZES[arguments.scale or "standard"]
        systems = arguments.systems or list(NAMES)
        if unknown := sorted(set(systems) - {*NAMES, *VARIANTS}):
            raise UserError(
                f"--systems: expected some of {', '.join((*NAMES, *VARIANTS))}, got {unknown[0]!r}"
            )
        for name in attributes:
            for found in ATTRIBUTES[name].scorers:
                scorer(found)
            if ATTRIBUTES[name].prompts == PROVOKING:
                prompts_of(PROVOKING, "measure", 1)
        seeds = arguments.seeds or SEEDS
        plan = Planner(size, attributes, seeds, targets, systems)()
        # The report includes results of other runs in the folder.
        targets = list(dict.fromkeys((*KL_TARGETS, *targets)))
        whole = Planner(size, list(ATTRIBUTES), max(seeds, SEEDS), targets)()
        resources = Resources()
        resources.use(size.backbone)
        store = Store(Path(arguments.out), STEPS, resources)
        report.restore(whole, store)
    left = list(pending(plan.cells(), store))
    _check_packages(left)
    print(f"{len(left)} cells to compute, about {_hours(left, plan, store)}", flush=True)
    outcome = compute(plan, store, arguments.minutes, arguments.state_mb)
    for path in report.write(whole, store):
        print(path)
    if outcome.left:
        hours = _hours(outcome.left, plan, store)
        print(f"{len(outcome.left)} cells are left, about {hours}; run the same command again")
        return EXIT_LEFT
    return 0


def _check_packages(left: list[Cell]) -> None:
    """Raise UserError for missing packages now, not after an hour."""
    methods: set[Any] = {cell.options.get("method") for cell in left} - {None, "dual_head"}
    for package in ("trl", "peft"):
        if methods and importlib.util.find_spec(package) is None:
            raise UserError(
                f"training {', '.join(sorted(methods))} needs the package {package}, which is not "
                f"installed; install it with: pip install 'dualhead_ext[{package}]'"
            )


def _hours(left: list[Cell], plan: Plan, store: Store) -> str:
    """The estimated time of the cells left, from finished cells of the same kind."""
    known: dict[str, list[float]] = {}
    for cell in plan.cells():
        for found in (cell, *cell.needs.values()):
            if (record := store.record(found)) is not None:
                known.setdefault(found.step, []).append(record["seconds"])
    total = 0.0
    for cell in left:
        if cell.step == "samples":
            low, high = cell.options["numbers"]
            total += cell.options["count"] * (high - low) * _EXPECTED_RESPONSE
        else:
            times = known.get(cell.step)
            total += sum(times) / len(times) if times else _EXPECTED[cell.step]
    return f"{total / 3600:.1f} hours" if total > 5400 else f"{total / 60:.0f} minutes"
