# SPDX-License-Identifier: Apache-2.0
"""The fused training loss against eager PyTorch, torch.compile and PyTorch's chunked loss.

See :mod:`dualhead_ext.bench.loss`. A benchmark fails if the loss is slower than eager or, at
d = 1024, V = 32000, if it takes more than 0.8 of eager's time or 15 % of eager's memory.
"""

from __future__ import annotations

import pytest

from dualhead_ext.bench import loss_cases, runner


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = loss_cases.plan(metafunc.config.option.benchmark_quick)
    metafunc.parametrize("case", cases, ids=str)


def test_loss(case, benchmarks):
    before = len(benchmarks.found.failures)
    runner.run_loss(case, benchmarks.found, benchmarks.seconds, benchmarks.emit)
    failures = benchmarks.found.failures[before:]
    assert not failures, "\n".join(failures)
