# SPDX-License-Identifier: Apache-2.0
"""The decode step by size: fused, eager, torch.compile, and the plain head.

See :mod:`dualhead_ext.bench.contenders`. A benchmark fails if the fused step is slower than eager
PyTorch. At d = 4096, V = 32000, B = 1 in bf16 it also fails if the step is neither 1.5 times as
fast as eager nor at 90 % of the memory bandwidth.
"""

from __future__ import annotations

import pytest

from dualhead_ext.bench import cases, runner


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.option.benchmark_quick
    growing = metafunc.function is test_growth
    groups = cases.plan(quick) if not growing else [] if quick else cases.growth_plan()
    metafunc.parametrize("group", groups, ids=str)


def test_decode_step(group, benchmarks):
    before = len(benchmarks.found.failures)
    runner.run_group(group, benchmarks.found, benchmarks.seconds, benchmarks.emit)
    failures = benchmarks.found.failures[before:]
    assert not failures, "\n".join(failures)


def test_growth(group, benchmarks):
    """Measure how the step's time grows with V, T and B. No speed is required here."""
    runner.run_growth(group, benchmarks.found, benchmarks.seconds, benchmarks.emit)
