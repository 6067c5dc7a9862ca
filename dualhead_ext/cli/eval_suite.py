# SPDX-License-Identifier: Apache-2.0
"""``dualhead eval --suite paper``: compute the missing cells, and write the report."""

from __future__ import annotations

import importlib.util
import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..eval.paper import report
from ..eval.paper.cells import Cell, Outcome, Store, pending, run, unfolded
from ..eval.paper.data import Data
from ..eval.paper.plan import Plan, Planner, check_names
from ..eval.paper.scales import SCALES
from ..eval.paper.steps import STEPS
from .errors import UserError, argument

if TYPE_CHECKING:
    from ..eval.steering.plan import Plan as SteeringPlan

EXIT_LEFT = 3
# Packages for training other systems than the gated head, and for plots.
_PACKAGES = ("trl", "peft", "matplotlib")


def main(arguments: Namespace) -> int:
    """Run, write the report, and print its path. Returns EXIT_LEFT if cells are left.

    Raises:
        UserError: unknown systems, or missing data or packages. Also any exception of a cell: a
            system that fails is not replaced by anything.
    """
    with argument():
        if arguments.decoders is not None:
            check_names(arguments.decoders)
        if (arguments.judge_url is None) != (arguments.judge_model is None):
            raise UserError("--judge-url and --judge-model: expected both or neither, got one")
        data = Data(arguments.data)
        plan = Planner(
            SCALES[arguments.scale],
            data,
            arguments.seeds,
            arguments.decoders,
            arguments.judge_url,
            arguments.judge_model,
        )()
        store = Store(Path(arguments.out), STEPS, data)
        report.restore(store)
    _check_packages(plan, store)
    outcome = compute(plan, store, arguments.minutes, arguments.state_mb)
    for path in report.write(plan, store, arguments.scale):
        print(path)
    if outcome.left:
        print(f"{len(outcome.left)} cells are left; run the same command again to continue")
        return EXIT_LEFT
    return 0


def _check_packages(plan: Plan, store: Store) -> None:
    """Raise UserError for missing packages now, not after an hour."""
    methods: set[Any] = {cell.options.get("method") for cell in pending(plan.cells(), store)}
    by_trl = sorted(methods - {None, "dual_head"})
    for package in _PACKAGES:
        needed = package == "matplotlib" or by_trl
        if needed and importlib.util.find_spec(package) is None:
            what = "the plots" if package == "matplotlib" else f"the systems {', '.join(by_trl)}"
            raise UserError(f"{what} need the package {package}, which is not installed")


def compute(
    plan: Plan | SteeringPlan,
    store: Store,
    minutes: float | None = None,
    state_mb: float | None = None,
) -> Outcome:
    """Compute the missing cells in at most ``minutes``. Afterwards, delete models beyond
    ``state_mb`` megabytes.
    """
    cells = plan.cells()
    with _quiet(), tqdm(desc="cells", dynamic_ncols=True) as bar:

        def announce(number: int, count: int, cell: Cell) -> None:
            bar.total, bar.n = count, number
            bar.set_postfix_str(f"{cell.step}: {cell.label}")

        outcome = run(cells, store, None if minutes is None else 60 * minutes, announce)
        bar.n = len(outcome.computed)
        bar.set_postfix_str("")
    if state_mb is not None:
        store.drop_files(unfolded(cells), outcome.left, int(1e6 * state_mb))
    return outcome


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide all progress bars but that of the cells, and warnings that each load would repeat."""
    shown = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "dualhead_ext.data.collate")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            transformers_logging.enable_progress_bar()
