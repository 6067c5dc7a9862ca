# SPDX-License-Identifier: Apache-2.0
"""Campaigns: what no list of cases holds, by random numbers from each test's own ``seed``.

Every test here runs once in the suite, in well under a minute, and ``--rounds N`` times with other
numbers: `make campaign` takes half an hour. A round that fails is run again by its name.
"""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.fixturenames.append("round_number")
    metafunc.parametrize("round_number", range(metafunc.config.option.rounds))
