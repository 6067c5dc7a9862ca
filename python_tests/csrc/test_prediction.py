# SPDX-License-Identifier: Apache-2.0
"""The prediction of the CUDA step's time, which is based on its machine code."""

from __future__ import annotations

import json

import pytest
from build_backend import ROOT

from tools.gpu import prediction, timings


def kernels(**changes):
    finish = {8: 570.0, 16: 310.0, 32: 210.0}
    return prediction.Kernel(
        **{"cycles_per_copy": 45.0, "consumer_bytes_per_clock": 60.0, "finish_cycles": finish}
        | changes
    )


def test_bytes_are_those_that_the_benchmark_counts():
    """For a head in bf16, and for an int4 head with its scales."""
    heads, everything = prediction.bytes_read(4096, 32000, 1, 256, "bf16")
    assert heads == 2 * 32000 * 4096 * 2 and 0 < everything - heads < 0.02 * heads
    assert prediction.bytes_read(4096, 32000, 1, 256, "int4")[0] == 2 * 32000 * (2048 + 32 * 4)


def test_the_model_gives_what_an_h200_measured_of_the_version_that_ran():
    """All twelve cases to 15 %, ten of them to 5 %: the constants explain more than one case."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200.json").read_text())
    steps = {r["case"]: r["us_median"] for r in rows["timings"] if r.get("contender") == "step"}
    ratios = []
    for name, measured in steps.items():
        case = timings.CASES[name]
        found = prediction.predict(
            kernels(), case.d, case.V, case.B, case.format, version=prediction.MEASURED_VERSION
        )
        ratios.append(found["us"] / measured)
        assert ratios[-1] == pytest.approx(1.0, abs=0.15), name
    assert len(ratios) == 12 and sum(abs(ratio - 1) < 0.05 for ratio in ratios) >= 10


def test_the_longest_of_what_runs_side_by_side_counts():
    case = (4096, 32000, 1, "bf16")
    free = prediction.predict(kernels(), *case)
    terms = ("start_us", "stream_us", "waves_us", "gate_us", "finish_us", "end_us")
    assert free["us"] == pytest.approx(sum(free[name] for name in terms), abs=0.4)
    slow = prediction.predict(kernels(cycles_per_copy=1000.0), *case)
    assert slow["stream_us"] > 1.9 * free["stream_us"]
    weak = prediction.predict(kernels(consumer_bytes_per_clock=8.0), *case)
    assert weak["us"] > free["us"] + 100


def test_a_late_alpha_and_the_ends_of_tiles_show():
    old = prediction.MEASURED_VERSION
    many = prediction.predict(kernels(), 4096, 32000, 64, "bf16", version=old)
    assert many["finish_us"] > 50, "two tiles of 60,000 clocks, as measured"
    assert prediction.predict(kernels(), 4096, 32000, 64, "bf16")["finish_us"] < 25
    assert prediction.predict(kernels(), 4096, 32000, 64, "bf16", version=old)["gate_us"] > 10
    assert prediction.predict(kernels(), 4096, 32000, 1, "bf16")["gate_us"] == 0, "tiles can wait"


def test_prediction_and_measurement_stand_side_by_side():
    rows = [
        {"case": name, "us": 100.0, "start_us": 9.0, "waves_us": 8.0, "gate_us": 0.0}
        | {"finish_us": 1.0, "end_us": 2.0, "memory_us": 80.0}
        for name in ("a", "b")
    ]
    measured = [
        {"case": "a", "contender": "copy", "us_median": 50.0},
        {"case": "a", "contender": "step", "us_median": 150.0},
    ]
    lines = prediction.beside({"rows": rows}, measured)
    assert lines[2] == "| a | 100.0 | 150.0 | 1.50 |  | start 9.0 | 80.0 |"
    assert lines[3] == "| b | 100.0 | not measured |  |  | start 9.0 | 80.0 |"


def test_every_case_of_the_timings_is_predicted_and_says_so(library_report):
    found = prediction.predictions(library_report)
    assert [row["case"] for row in found["rows"]] == list(timings.CASES)
    assert set(prediction.GOALS) <= set(timings.CASES)
    assert found["note"].startswith("A PREDICTION")
    assert all(row["predicted"] and row["us"] > row["memory_us"] for row in found["rows"])


def test_a_committed_prediction_is_labelled():
    path = prediction.RESULT
    if path.is_file():
        found = json.loads(path.read_text())
        assert found["predicted"] is True and found["note"] == prediction.NOTE
        assert "cases" not in found, "a results file's key, which documents quote"
