# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of whole models, with and without the gated head.

See :mod:`dualhead_ext.bench.generation`.
"""

from __future__ import annotations

import pytest

from dualhead_ext.bench import generation, runner


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = generation.plan(metafunc.config.option.benchmark_quick)
    metafunc.parametrize("model", models, ids=lambda model: model.name)


def test_generate(model, benchmarks):
    runner.run_model(model, benchmarks.found, benchmarks.seconds, benchmarks.emit)
    rates = {row["contender"]: row["tokens_per_s_median"] for row in benchmarks.found.generate[-4:]}
    assert set(rates) == {"backbone", "dualhead", "logits", "eager"}
    assert min(rates.values()) > 0
