# SPDX-License-Identifier: Apache-2.0
"""Files that a training run writes beside the heads: its curves and the model card."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..eval.metrics import longer_is_better
from ..files.atomic import replace_files
from ..model.sharing import Training, describe_training
from ..train.trainer import DualHeadTrainer
from .training_summary import Figures

PLOT_NAME = "training.png"


def write_plot(
    output: str, history: list[dict[str, Any]], steps: int, before: Figures, after: Figures
) -> str:
    """Write the curves. Returns the end of a sentence that says where they are, or why there are
    none.

    Args:
        history: the trainer's logs. steps: optimizer steps of the run.
    Raises:
        OSError: the disk.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return " (no curves: pip install 'dualhead_ext[plot]')"
    from ..measurement.figure import png
    from .training_plot import training_figure

    losses = [row["loss"] for row in history if "loss" in row]
    if not losses:
        return f" (no curves: no log in {steps} steps; see --logging-steps)"
    finding, held_out = f"Loss {losses[0]:.3g} to {losses[-1]:.3g}", None
    if after.total:
        held_out = (before.accuracy, after.accuracy)
        finding = f"Held-out pairs right: {held_out[0]:.1%} before, {held_out[1]:.1%} after"
    figure = training_figure(history, f"{finding}, in {steps} steps", held_out, after.kl)
    replace_files(Path(output), {PLOT_NAME: png(figure)})
    return f", curves in {Path(output) / PLOT_NAME}"


def write_card(
    arguments: Namespace,
    trainer: DualHeadTrainer,
    rows: str,
    held_out: list[dict[str, Any]],
    after: Figures,
) -> None:
    """Write the model card again, with the training data and the measured accuracy.

    Args:
        rows: how many of what kind, in words.
    Raises:
        OSError: the disk.
    """
    facts = Training(
        data=_public_name(arguments.data),
        rows=rows,
        steps=trainer.state.global_step,
        kl=after.kl,
        alpha=after.alpha,
    )
    if after.total:
        where = _public_name(arguments.eval_data or arguments.data)
        facts = replace(
            facts,
            accuracy=(after.accuracy, *after.interval),
            longer=longer_is_better(held_out)[0],
            measured_on=f"{after.total} held-out pairs of {where}",
        )
    describe_training(Path(arguments.output), facts)


def _public_name(data: str) -> str:
    """The name of the data in a card: the last part of a path."""
    return Path(data).name if os.path.exists(data) else data
