# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: seeds, the rule for GPU tests, bare kernels. Options: ../conftest.py."""

from __future__ import annotations

import os
import random
import zlib
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import native
import numpy
import pytest
import torch

NO_CUDA = "needs a CUDA device"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number for this test's own generators, from --seed and the test's name."""
    # The folder does not count, so that a test which moves keeps its random numbers.
    name = f"python_tests/{request.node.nodeid.rpartition('/')[2]}"
    return zlib.crc32(f"{request.config.option.seed} {name}".encode())


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Give each test the same random numbers, whatever ran before it."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def testing_module() -> ModuleType:
    """The bare kernels over NumPy arrays: the CPU's, and the CUDA ones on the host backend."""
    return native.testing_module()


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of a real chat model with 135M parameters. Its first use converts the model."""
    from dualhead_ext.model.builtin_backbones import smollm2_path

    try:
        return str(smollm2_path())
    except ImportError as error:
        pytest.skip(str(error))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that quick_cases(n) does not choose as slow.

    The choice follows a hash of the names, so that it mixes the parameters and is always the same.
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick_cases"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for those in cases.values():
        (count,) = those[0].get_closest_marker("quick_cases").args
        for item in sorted(those, key=lambda item: zlib.crc32(item.name.encode()))[count:]:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(NO_CUDA)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With --require-cuda, a GPU test that is skipped for any reason counts as failed."""
    report = yield
    required = item.config.option.require_cuda and item.get_closest_marker("cuda")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped although --require-cuda was given: {reason}"
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """With --require-cuda, a run without any GPU test fails."""
    if session.config.option.require_cuda and not any(
        item.get_closest_marker("cuda") for item in session.items
    ):
        raise pytest.UsageError("--require-cuda: no test marked cuda was collected")
