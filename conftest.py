# SPDX-License-Identifier: Apache-2.0
"""Options of pytest, here at the root so that they are known whatever is collected."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dualhead_ext")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmarks (benchmarks/) instead of the tests (python_tests/)",
    )
    group.addoption(
        "--require-cuda",
        action="store_true",
        help="fail the tests marked cuda that would be skipped, and a run that has none of them",
    )
    group.addoption(
        "--seed", type=int, default=0, help="seed of each test's random numbers (default 0)"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """One of the two folders, never both: timings beside tests would be worthless."""
    other = "python_tests" if config.option.benchmark else "benchmarks"
    return True if collection_path == ROOT / other else None
