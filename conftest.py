# SPDX-License-Identifier: Apache-2.0
"""Options of pytest for tests and benchmarks, and a description of the machine in the header.

All options are declared here. Otherwise pytest would take the value of an option it does not know
yet ("--seed 1") for a path, and would then look for conftest.py files in the root only.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: each worker gets one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent
OTHER = {False: ROOT / "benchmarks", True: ROOT / "python_tests"}


def pytest_addoption(parser: pytest.Parser) -> None:
    from dualhead_ext.bench import QUICK_SECONDS, SECONDS

    group = parser.getgroup("dualhead_ext")
    group.addoption(
        "--seed", type=int, default=0, help="seed of each test's random numbers (default 0)"
    )
    group.addoption(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="rounds of each test of python_tests/campaigns, each of other numbers (default 1)",
    )
    group.addoption(
        "--require-cuda",
        action="store_true",
        help="fail the tests marked cuda that would be skipped, and a run that has none of them",
    )
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks (benchmarks/) instead of the tests (python_tests/)",
    )
    group.addoption(
        "--benchmark-quick",
        action="store_true",
        help="with --benchmark: a few sizes, in under a minute",
    )
    group.addoption(
        "--benchmark-seconds",
        type=float,
        metavar="S",
        help=f"timing per case (default {SECONDS:g}, quick {QUICK_SECONDS:g})",
    )
    group.addoption(
        "--results-json", metavar="FILE", help="with --benchmark: write the results there"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect tests or benchmarks, never both: tests beside timings would make them worthless."""
    return True if collection_path.is_relative_to(OTHER[config.option.benchmark]) else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    import torch

    import dualhead_ext

    info = dualhead_ext.build_info()
    count = torch.cuda.device_count()
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    levels = ", ".join(info["cpu_isa_levels"]) or "none"
    archs = ", ".join(info["cuda_archs"]) or "none"
    lines = [
        f"torch {info['torch']}; CPU: {torch.get_num_threads()} threads; CUDA devices: {gpus}",
        f"kernels: CPU {info['cpu_isa']} of {levels}; CUDA archs {archs}; commit {info['commit']}",
        f"seed: {config.option.seed} (--seed N for another)",
    ]
    if info["cpu_problem"]:
        lines.append(f"no CPU kernels: {info['cpu_problem']}")
    if torch.version.cuda and info["cuda_problem"]:
        lines.append(f"no CUDA kernels: {info['cuda_problem']}")
    return lines
