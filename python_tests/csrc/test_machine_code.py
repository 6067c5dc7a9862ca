# SPDX-License-Identifier: Apache-2.0
"""The report on the CUDA kernels' machine code, and the prediction that is based on it.

Listings written by hand are always tested. The built library is tested if nvcc and cuobjdump are
there.
"""

from __future__ import annotations

import json

import pytest
from build_backend import ROOT, libraries

from tools.gpu import machine_code, prediction, timings

FORMATS = ("bf16", "fp16", "int8", "fp8", "int4")


def listing(*instructions, name="_ZN8dualhead13stream_kernelILNS0_6FormatE4ELb1EEEv"):
    """A listing as cuobjdump prints it. Each instruction is (text, stall, scoreboard set,
    scoreboards waited for).
    """
    lines = [f"\t\tFunction : {name}"]
    rows = [*instructions, *[("NOP", 0, 7, 0)] * 40]
    for place, (text, stall, sets, waits) in enumerate(rows):
        control = stall << 41 | sets << 46 | waits << 52
        lines.append(f"        /*{place * 16:04x}*/                   {text} ;  /* 0x{0:016x} */")
        lines.append(f"                                             /* 0x{control:016x} */")
    return "\n".join(lines)


def report_of(*instructions):
    [code] = machine_code.parse(listing(*instructions)).values()
    return machine_code.report_of(code)


def plain(text, stall=1, sets=7, waits=0):
    return text, stall, sets, waits


def test_a_copy_in_a_loop_over_lanes_is_seen():
    loop = [
        plain("ELECT P0, UR4, PT", 12),
        plain("R2UR UR6, R4", 9),
        plain("@UP0 UBLKCP.S.G [UR16], [UR14], UR12, desc[UR4]", 2),
        plain("@P0 BRA.U.ANY 0x0", 5),
    ]
    assert report_of(*loop)["copy_loops"] == [
        {"copies": 1, "kind": "UBLKCP", "by_lanes": True, "stall_cycles_per_copy": 28.0}
    ]
    loop[-1] = plain("@P0 BRA 0x0", 5)
    assert not report_of(*loop)["copy_loops"][0]["by_lanes"]


def test_copies_are_counted_in_their_own_loop():
    found = report_of(
        plain("MOV R0, R1", 15),
        plain("UTMALDG.3D [UR8], [UR4]", 4),
        plain("UTMALDG.3D [UR8], [UR4]", 6),
        plain("@P0 BRA 0x10", 2),
        plain("@P0 BRA 0x0", 9),
    )
    assert found["copy_loops"] == [
        {"copies": 2, "kind": "UTMALDG", "by_lanes": False, "stall_cycles_per_copy": 6.0}
    ]


def test_loads_in_flight_are_those_before_the_first_wait():
    load, use = "LDG.E.128 R4, desc[UR4][R2.64]", "FADD R1, R4, R5"
    serial = report_of(
        plain(load, sets=0), plain(use, waits=1), plain(load, sets=0), plain("BRA 0x0")
    )
    assert serial["global_loops"][0] | {"polls": 0} == {
        "loads": 2, "before_a_wait": 1, "bits": 128, "products": 0, "polls": 0
    }  # fmt: skip
    many = report_of(
        *[plain(load, sets=1)] * 8, plain(use, waits=1), plain(use, waits=2), plain("BRA 0x0")
    )
    assert many["global_loops"][0]["before_a_wait"] == 8, "a wait for another scoreboard is none"


def test_shared_loads_of_products_by_width():
    found = report_of(
        plain("LDS R4, [R2]"),
        plain("LDS.128 R4, [R2]"),
        plain("LDSM.16.M88.4 R4, [R2]"),
        plain("HMMA.16816.F32 R4, R8, R12, R4", 7),
        plain("@P0 BRA 0x0", 5),
        plain("LDS.U8 R4, [R2]"),  # outside of the loop
        plain("STL [R1], R4"),
    )
    spilling = report_of(
        plain("LDS.128 R4, [R2]"),
        plain("LDL R8, [R1]"),
        plain("HMMA.16816.F32 R4, R8, R12, R4", 7),
        plain("@P0 BRA 0x0", 5),
    )
    assert spilling["consumer_loops"][0]["local_accesses"] == 1
    around = report_of(
        plain("LDS.64 R4, [R2]", 3),
        plain("HMMA.16816.F32 R4, R8, R12, R4", 7),
        plain("@P0 BRA 0x10", 5),
        plain("@P0 BRA 0x0", 5),
    )
    assert around["consumer_loops"][0]["shared_loads"] == {"64": 1}, "read once, used several times"
    assert found["consumer_loops"] == [
        {
            "products": 1,
            "instructions": 5,
            "stall_cycles": 15,
            "shared_loads": {"128": 1, "32": 1, "LDSM": 1},
            "local_accesses": 0,
        }
    ]


def test_fences_count_where_they_repeat():
    fences = [plain("MEMBAR.SC.GPU"), plain("CCTL.IVALL")]
    assert report_of(*fences)["membar_sc_in_loops"] == 0
    found = report_of(*fences, plain("@P0 BRA 0x0"))
    assert found["membar_sc_in_loops"] == found["l1_wipes_in_loops"] == 1


def test_a_branch_to_itself_is_no_loop():
    [code] = machine_code.parse(listing(plain("BRA 0x0"))).values()
    assert machine_code.loops(code) == []


def test_what_cannot_be_read_is_an_error():
    text = listing(plain("NOP")).replace("0x00000000", "oops", 3)
    assert "oops" in text
    broken = "\n".join(line for line in listing(plain("NOP")).splitlines()[:2])
    with pytest.raises(ValueError, match="without control bits"):
        machine_code.parse(broken + "\nnothing")


def test_names_are_the_same_from_build_to_build():
    prefix = "_ZN8dualhead4cuda12_GLOBAL__N__a_9_x_cu_6b"
    names = {
        f"{prefix}13stream_kernelILNS0_6FormatE4ELb1EEEvNS_": "stream_kernel<int4, 1>",
        f"{prefix}18decode_step_kernelILb0EEEvNS_": "decode_step_kernel<0>",
        f"{prefix}25loss_rows_backward_kernelENS_14Loss": "loss_rows_backward_kernel",
        "_Z5other": "_Z5other",
    }
    assert {name: machine_code.short_name(name) for name in names} == names


def test_limits_find_what_is_over_them():
    copies = {"copies": 8, "kind": "UTMALDG", "by_lanes": False, "stall_cycles_per_copy": 46}
    consumers = {"products": 8, "shared_loads": {"128": 2, "LDSM": 1}, "local_accesses": 0}
    projection = {"loads": 8, "before_a_wait": 8, "products": 8}
    good = {
        "copy_loops": [copies],
        "consumer_loops": [consumers],
        "global_loops": [projection],
        "membar_sc_in_loops": 0,
    }
    assert machine_code.violations(good) == []
    for change, word in (
        ({"membar_sc_in_loops": 1}, "MEMBAR.SC"),
        ({"copy_loops": [copies | {"by_lanes": True}]}, "loop over lanes"),
        ({"copy_loops": [copies | {"stall_cycles_per_copy": 300}]}, "cycles per copy"),
        (
            {"consumer_loops": [consumers | {"shared_loads": {"32": 1}}]},
            "shared loads",
        ),
        ({"consumer_loops": [consumers | {"local_accesses": 2}]}, "spilled"),
        ({"global_loops": [projection | {"before_a_wait": 1}]}, "projection"),
    ):
        assert word in "; ".join(machine_code.violations(good | change)), change


# --- the prediction -------------------------------------------------------------------------------


def kernels(**changes):
    return prediction.Kernel(
        **{"cycles_per_copy": 45.0, "consumer_bytes_per_clock": 60.0} | changes
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
    many = prediction.predict(kernels(), 4096, 32000, 64, "bf16")
    assert many["finish_us"] > 50, "two tiles of 60,000 clocks, as measured"
    old = prediction.MEASURED_VERSION
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


# --- what is built --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library_report():
    library = ROOT / "dualhead_ext" / "_C_cuda.so"
    if not library.is_file():
        pytest.skip("the CUDA library is not built (no nvcc)")
    if machine_code.find_tool() is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed Triton")
    found = machine_code.report(library)
    if not found:
        pytest.skip("the CUDA library has no code for sm_90a")
    return found


@pytest.fixture
def of_these_sources():
    record = json.loads((ROOT / "dualhead_ext" / "_build_info.json").read_text())
    if record["csrc_sha256"] != libraries.csrc_hash():
        pytest.skip("the library that is built is of other sources than csrc/: make build")


@pytest.mark.parametrize("corrects", [0, 1], ids=["full", "correction"])
@pytest.mark.parametrize("format", FORMATS)
def test_streaming_kernels_keep_their_limits(library_report, of_these_sources, format, corrects):
    one = library_report[f"stream_kernel<{format}, 1, {corrects}>"]
    assert machine_code.violations(one) == []
    rate = prediction.kernel_of(one, format).consumer_bytes_per_clock
    assert rate >= prediction.least_consumer_rate(), "consumers are slower than memory"


def test_the_report_has_every_hot_kernel(library_report):
    """Every report has copies and products. A pattern that no longer matches would find none."""
    for name in (f"stream_kernel<{format}, 1, {kind}>" for format in FORMATS for kind in (0, 1)):
        one = library_report[name]
        assert one["copy_loops"] and one["consumer_loops"] and one["global_loops"]
        assert {loop["kind"] for loop in one["copy_loops"]} <= set(machine_code.COPIES)
        assert 100 < one["registers"] <= 255
    others = {"decode_step_kernel<0, 0>", "loss_rows_kernel", "loss_rows_backward_kernel"}
    assert others <= set(library_report)
