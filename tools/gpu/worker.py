# SPDX-License-Identifier: Apache-2.0
"""The worker of :func:`tools.gpu.processes.go_through`: a process that runs cases and reports them
on standard output. As a pytest plugin (``-p tools.gpu.worker``), its cases are tests.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .processes import MARK, SECONDS_PER_CASE
from .records import FAILED, PASSED

if TYPE_CHECKING:
    import pytest

_out = os.dup(1)  # pytest replaces file descriptor 1
DEVICE_LOST = 9  # exit code


def say(**fields: Any) -> None:
    """Print one record with a single write, so that other output cannot interrupt it."""
    os.write(_out, f"\n{MARK}{json.dumps(fields)}\n".encode())


def seconds_per_case() -> float:
    """The limit after which this process is killed; shortly before, it prints its stack."""
    return float(os.environ.get(SECONDS_PER_CASE, 1e6))


def phase(name: str) -> None:
    """Report the case's next phase, for the message about a case that hangs."""
    say(phase=name)


def row(**fields: Any) -> None:
    """Report a result of the current case; it is kept even if the case fails later."""
    say(row=fields)


def load() -> None:
    """Do slow imports, so that their time is not part of a case."""
    import dualhead_ext.bench.decode
    import dualhead_ext.functional
    import dualhead_ext.ops  # noqa: F401


def go_through(cases: Iterable[str], run: Callable[[str], dict[str, Any]]) -> None:
    """Run each case. ``run`` returns fields of its record, "outcome" among them if it is not
    "passed"; an exception is a failure."""
    for case in cases:
        say(start=case)
        faulthandler.dump_traceback_later(max(seconds_per_case() - 1.5, 0.5))
        try:
            fields = {"outcome": PASSED, **run(case)}
        except Exception as error:  # the other cases still run
            traceback.print_exc()
            text = " ".join(str(error).split())[:600]
            fields = {"outcome": FAILED, "detail": f"{type(error).__name__}: {text}"}
        faulthandler.cancel_dump_traceback_later()
        say(end=case, **fields)
        if fields["outcome"] != PASSED:
            _end_if_device_is_lost()


def _end_if_device_is_lost() -> None:
    """Exit if CUDA no longer works in this process, as after an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.stdout.flush()
        os._exit(DEVICE_LOST)


# --- as a plugin of pytest ------------------------------------------------------------------------

_reports: list[pytest.TestReport] = []
_started = 0.0


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    global _started
    _started = time.monotonic()
    _reports.clear()
    say(start=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Set-up, call or tear-down of the test has ended."""
    _reports.append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """The test has finished, including tear-down."""
    failed = [report for report in _reports if report.failed]
    fields: dict[str, Any] = {"outcome": FAILED if failed else PASSED}
    if not failed and any(report.skipped for report in _reports):
        fields["outcome"] = "skipped"
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        message = crash.message if crash else str(failed[0].longrepr)
        fields |= {"when": failed[0].when, "detail": message[:900]}
        fields["text"] = failed[0].longreprtext[-1500:]
    say(end=nodeid, test_seconds=round(time.monotonic() - _started, 2), **fields)
    if failed:
        _end_if_device_is_lost()
