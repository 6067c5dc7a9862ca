# SPDX-License-Identifier: Apache-2.0
"""Campaigns: random cases that no list covers, drawn from each test's own ``seed``.

The suite runs each test once, in well under a minute. ``--rounds N`` runs it N times with different
random numbers; `make campaign` takes half an hour. To repeat a failed round, run it by its name.
"""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.fixturenames.append("round_number")
    metafunc.parametrize("round_number", range(metafunc.config.option.rounds))
