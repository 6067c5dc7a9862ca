# SPDX-License-Identifier: Apache-2.0
"""Tiny cases of the benchmarks, and made-up results, for the tests of the benchmarks' code."""

from __future__ import annotations

from dualhead_ext.bench import cases, decode
from dualhead_ext.measurement import machine
from dualhead_ext.measurement.timing import Timing

TINY = cases.Group(40, 77, "bf16", (cases.Case(2, 9), cases.Case(1, 5, sampled=True)))
EFFORT = decode.Effort(seconds=0.0, cold_bytes=1, cache_bytes=2**40, min_rounds=3)
READ = machine.ReadBandwidth(10.0, "sum of fp32", {"sum of fp32": 10.0})
STEADY = [10.0 + i % 3 for i in range(30)]  # microseconds


def case_result(group, case, dualhead, eager):
    """A result with these microseconds."""
    timings = {n: Timing(n, tuple(us)) for n, us in (("dualhead", dualhead), ("eager", eager))}
    return decode.CaseResult(group, case, timings, dict.fromkeys(timings, 1000), 1, None)
