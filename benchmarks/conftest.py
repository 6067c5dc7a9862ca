# SPDX-License-Identifier: Apache-2.0
"""The report that ``pytest --benchmark`` fills. Its options are in ../conftest.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dualhead_ext.bench import check_options, report, runner

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    try:
        check_options(option.benchmark_seconds, option.results_json)
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from None
    for name in ("benchmark_quick", "benchmark_seconds", "results_json"):
        value = getattr(option, name)  # 0 is a valid number of seconds
        if value is not None and value is not False and not option.benchmark:
            raise pytest.UsageError(f"--{name.replace('_', '-')} needs --benchmark")
    if option.benchmark and option.showcapture == "all":
        # The benchmarks print with capturing disabled. What is captured is thousands of lines of
        # the log of torch's compiler, which would hide the failure.
        option.showcapture = "no"


@dataclass
class Session:
    """State shared by the benchmarks: report, seconds per case, printing without capture."""

    found: report.Report
    seconds: float | None
    emit: Callable[[str], None]


@pytest.fixture(scope="session")
def benchmarks(pytestconfig: pytest.Config) -> Iterator[Session]:
    """The run's report; written to --results-json at the end, including failures."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def emit(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(text, flush=True)

    emit("")
    found = runner.start(pytestconfig.option.benchmark_quick, emit)
    _require_fresh_build(found)
    yield Session(found, pytestconfig.option.benchmark_seconds, emit)
    if pytestconfig.option.results_json is not None:
        found.write(pytestconfig.option.results_json)


def _require_fresh_build(found: report.Report) -> None:
    """Fail if the library is older than csrc/: its figures would be taken for those of csrc/."""
    sys.path.insert(0, str(ROOT / "_build"))
    from libraries import csrc_hash

    if csrc_hash() != found.environment["csrc_sha256"]:
        pytest.fail("csrc/ has changed since it was compiled; run `make build`", pytrace=False)
