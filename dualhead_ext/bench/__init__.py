# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: one timer; decode steps, the training loss, whole models, training, reward heads
that are corrections; reports.

``dualhead bench`` and ``pytest --benchmark`` are two front ends of what is here. Importing this
module imports neither torch nor transformers.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

# What there is to measure. Without a choice: decode, loss and models on the CPU; on a GPU decode
# and loss. Corrections are measured on the CPU alone.
PARTS = ("decode", "loss", "models", "training", "corrections")

# Of timing per case; the slowest cases take longer, since a median needs some rounds.
SECONDS, QUICK_SECONDS = 1.0, 0.3


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of ``dualhead bench``."""
    parser.add_argument("--quick", action="store_true", help="a few sizes, in under a minute")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"timing per case (default {SECONDS:g}, with --quick {QUICK_SECONDS:g})",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what to measure; cuda: decode steps and the training loss",
    )
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"only these: {', '.join(PARTS)} (default: decode, loss, models; "
        "on a GPU decode and a part of loss)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="measure nothing: print FILE, written by --json, as a Markdown table",
    )
    parser.add_argument(
        "--plot", metavar="PNG", help="with --report: also draw the results (needs matplotlib)"
    )
    parser.add_argument(
        "--plot-growth",
        metavar="PNG",
        help="with --report: draw how a step's time grows with V, T and B",
    )


def main(arguments: Namespace) -> int:
    """Run ``dualhead bench``. Returns the exit code: 1 if the fused step was too slow somewhere.

    Raises:
        ValueError, OSError: what the user asked for cannot be done; said before anything runs.
        RuntimeError: there is no compiled kernel.
    """
    from . import report

    if arguments.report is not None:
        results = report.load(arguments.report)
        print(report.markdown(results))
        if arguments.plot is not None:
            from . import plot

            plot.draw(results, arguments.plot)
        if arguments.plot_growth is not None:
            from . import plot

            plot.draw_growth(results, arguments.plot_growth)
        return 0
    for option, given in (("--plot", arguments.plot), ("--plot-growth", arguments.plot_growth)):
        if given is not None:
            raise ValueError(f"{option} draws a results file: it needs --report FILE")
    check_options(arguments.seconds, arguments.json, arguments.device, arguments.part)
    from . import runner

    def emit(text: str) -> None:
        print(text, flush=True)

    run = (arguments.quick, arguments.seconds, emit)
    if arguments.device == "cuda":
        found = runner.run_gpu(*run, arguments.json, parts=arguments.part)
    else:
        parts = [] if arguments.part is None else [arguments.part]
        found = runner.run(*run, *parts, path=arguments.json)
    if arguments.json is not None:
        found.write(arguments.json)
    for failure in found.failures:
        print(f"too slow: {failure}")
    return 1 if found.failures else 0


def check_options(
    seconds: float | None, json: str | None, device: str = "cpu", parts: Sequence[str] | None = None
) -> None:
    """Raise for options that could only fail after the benchmark has run.

    Raises:
        ValueError: seconds negative or not finite, a device that is not there, or a part that does
            not run on it.
        FileNotFoundError, IsADirectoryError: no results file could be written there.
    """
    from pathlib import Path

    if seconds is not None and not 0 <= seconds < float("inf"):
        raise ValueError(f"seconds must be at least 0 and finite, got {seconds}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"device cuda: torch {torch.__version__} finds no CUDA device")
        if "corrections" in (parts or ()):
            raise ValueError("part corrections: measured on the CPU alone, got device cuda")
    if json is None:
        return
    if Path(json).is_dir():
        raise IsADirectoryError(f"the results file must not be a folder, got {json}")
    if not Path(json).absolute().parent.is_dir():
        raise FileNotFoundError(f"the results file must be in a folder that exists, got {json}")
