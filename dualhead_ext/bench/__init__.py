# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of decode steps, the training loss, whole models, training steps and correction
reward heads, and their reports.

``dualhead bench`` and ``pytest --benchmark`` are its two front ends. Importing this module imports
neither torch nor transformers.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

# The parts of the benchmark. Default: decode, loss and models on the CPU; decode and loss on a GPU.
# Corrections are measured on the CPU only.
PARTS = ("decode", "loss", "models", "training", "corrections")

# Seconds of timing per case; the slowest cases take longer, since a median needs several rounds.
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
        help="the device to measure; cuda: decode steps and the training loss",
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
    """Run ``dualhead bench``. Returns the exit code: 1 if any requirement was missed.

    Raises:
        ValueError, OSError: invalid options; raised before anything is measured.
        RuntimeError: there is no compiled kernel to measure.
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
        parts = {} if arguments.part is None else {"parts": arguments.part}
        found = runner.run(*run, **parts, path=arguments.json)
    if arguments.json is not None:
        found.write(arguments.json)
    for failure in found.failures:
        print(f"too slow: {failure}")
    return 1 if found.failures else 0


def check_options(
    seconds: float | None, json: str | None, device: str = "cpu", parts: Sequence[str] | None = None
) -> None:
    """Check options whose errors would otherwise show only during or after the benchmark.

    Raises:
        ValueError: ``seconds`` is negative or not finite, the device is missing, or a part does not
            run on it.
        FileNotFoundError, IsADirectoryError: the results file cannot be written at ``json``.
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
