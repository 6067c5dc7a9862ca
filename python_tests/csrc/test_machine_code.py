# SPDX-License-Identifier: Apache-2.0
"""The report on the CUDA kernels' machine code, and its limits.

Listings written by hand are always tested. The built library is tested if nvcc and cuobjdump are
there.
"""

from __future__ import annotations

import pytest

from tools.gpu import limits, listing, machine_code, prediction

FORMATS = ("bf16", "fp16", "int8", "fp8", "int4")


def text_of(*instructions, name="_ZN8dualhead13stream_kernelILNS0_6FormatE4ELb1EEEv"):
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
    [code] = listing.parse(text_of(*instructions)).values()
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
    assert serial["global_loops"] == [{"loads": 2, "before_a_wait": 1, "bits": 128, "products": 0}]
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
    assert report_of(*fences, plain("@P0 BRA 0x0"))["membar_sc_in_loops"] == 1


def polling(in_loop=(), after=("MEMBAR.ALL.GPU", "CCTL.IVALL"), load="LDG"):
    """The report on a loop that polls a counter, or with LD the toolkit's grid barrier."""
    look = plain(f"{load}.E.STRONG.GPU R0, desc[UR4][R2.64]", sets=0)
    again = plain("@!P0 BRA 0x0")
    found = report_of(
        plain("NANOSLEEP 0x20"), look, *map(plain, in_loop), again, *map(plain, after)
    )
    [poll] = found["polls"]
    return found, poll


def test_a_poll_has_its_only_fence_behind_it():
    found, poll = polling()
    assert poll == {"of": "counter", "sleeps": True, "fences": 0, "fences_after": 1}
    assert limits.fence_violations(found) == []
    found, poll = polling(in_loop=["MEMBAR.ALL.GPU", "CCTL.IVALL"])
    assert poll["fences"] == 2
    assert limits.fence_violations(found) == ["2 fences in a loop that polls"]
    found, _ = polling(after=[])
    assert limits.fence_violations(found) == ["0 fences after a loop that polls, expected 1"]
    found, poll = polling(in_loop=["CCTL.IVALL"], load="LD")
    assert poll["of"] == "grid barrier" and limits.fence_violations(found) == []


def test_the_shortest_path_leaves_out_what_a_branch_can_avoid():
    [code] = listing.parse(
        text_of(
            plain("MOV R0, R1", 2),
            plain("@P0 BRA 0x40", 5),
            plain("MEMBAR.ALL.GPU", 6),
            plain("BRA 0x50", 3),
            plain("NOP", 1),
            plain("UTMALDG.3D [UR8], [UR4]", 4),
            plain("@P1 BRA 0x50", 5),
            plain("BRA P2, 0x0", 5),
        )
    ).values()
    loop = max(listing.loops(code), key=len)
    path = listing.shortest_path(loop, [])
    assert [one.address for one in path] == [0x00, 0x10, 0x40, 0x50, 0x60, 0x70]
    assert listing.cycles_of(path) == 22
    through = listing.shortest_path(loop, [loop[2], loop[5]])
    assert listing.cycles_of(through) == 2 + 5 + 6 + 3 + 4 + 5 + 5
    twice = listing.shortest_path(loop, [], lambda one: one.opcode == "UTMALDG.3D", least=2)
    assert listing.cycles_of(twice) == 22 + 9, "another round of the inner loop"
    with pytest.raises(ValueError, match="no way through"):
        listing.shortest_path(loop, [loop[5], loop[2]])


# A producer's loop: waits, announces, copies a box of each matrix in two loops, and one of hidden
# states that a branch may leave out.
PRODUCER = [
    plain("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R2", 2),
    plain("@P1 BRA 0x30", 5),
    plain("CCTL.IVALL", 4),
    plain("SYNCS.ARRIVE.TRANS64 RZ, [UR9], R2", 10),
    plain("NOP", 14),
    plain("UTMALDG.3D [UR8], [UR4]", 10),
    plain("@P0 BRA 0x50", 5),
    plain("@P1 BRA 0x40", 1),
    plain("NOP", 15),
    plain("UTMALDG.3D [UR8], [UR4]", 10),
    plain("@P0 BRA 0x90", 5),
    plain("@P1 BRA 0x80", 1),
    plain("@P2 BRA 0xf0", 5),
    plain("UTMALDG.3D [UR8], [UR4]", 7),
    plain("@P0 BRA 0xd0", 5),
    plain("BRA P3, 0x0", 6),
]


def test_issue_cycles_of_a_stage():
    [found] = report_of(*PRODUCER)["producers"]
    assert found == {
        "cycles": 2 + 5 + 10 + 30 + 31 + 5 + 6,
        "cycles_with_hidden": 2 + 5 + 10 + 30 + 31 + 5 + 12 + 6,
        "per_block": 31, "per_box": 15, "per_hidden_box": 12, "fences": 0,
    }  # fmt: skip
    # 7 units are boxes of 4, 2 and 1; two blocks of each of two matrices
    last = limits.Stages(units=8, left=7, blocks=2, hidden=0)
    assert last.issue_cycles(found, "bf16") == 89 + 2 * 31 + 4 * 2 * 15
    assert last.bytes("bf16") == 7 * 8 * 256 * 2
    full = limits.Stages(units=8, left=8, blocks=1, hidden=64)
    assert full.issue_cycles(found, "int4") == 101 + 3 * 12
    assert full.bytes("int4") == 16384 + 4 * 64 * 128
    shares = limits.issue_shares(found, "bf16")
    assert shares["one request, full stage"] == pytest.approx(151 / (32768 / 16.5), abs=1e-3)
    mean = (3 * 151 + 271) / ((3 * 32768 + 28672) / 16.5)
    assert shares["one request, mean"] == pytest.approx(mean, abs=1e-3)


def loss_loop(hidden=0, after=90, exponentials=8):
    """A loop over logits that loads eight of them; hidden, after: tens of cycles between the loads
    and the wait for them, and behind it."""
    wide = plain("LDG.E.128 R4, desc[UR4][R2.64]", 2, sets=0)
    rows = [wide, wide, *[plain("NOP", 10)] * hidden, plain("FMUL R1, R4, R5", waits=1)]
    rows += [plain("FFMA.SAT R1, R1, R2, 0.5")] * exponentials
    return report_of(*rows, *[plain("NOP", 10)] * after, plain("@P0 BRA 0x0", 5))


def test_loops_of_the_loss():
    found = loss_loop() | {"registers": 55, "local_bytes": 0, "stack_bytes": 0}
    [loop] = found["element_loops"]
    assert loop == {
        "instructions": 102, "stall_cycles": 918, "cycles_before_wait": 2,
        "wide_loads": 2, "wide_stores": 0, "local_accesses": 0,
    }  # fmt: skip
    # two blocks of 512 threads with 56 registers; 2 cycles of the latency are hidden
    assert limits.bytes_per_clock(loop, 55) == 1024 * 32 / (918 + 1598)
    assert limits.loss_violations(found, stores=False) == ["13.0 bytes per clock, of 16.5"]
    hidden = loss_loop(hidden=90, after=0)
    good = found | {"element_loops": hidden["element_loops"]}
    assert limits.loss_violations(good, stores=False) == []
    assert "0 wide stores" in limits.loss_violations(good, stores=True)[0]
    assert "stack" in limits.loss_violations(good | {"stack_bytes": 8}, False)[0]
    slow = [good["element_loops"][0] | {"instructions": 249}]
    assert "249 instructions" in limits.loss_violations(good | {"element_loops": slow}, False)[0]
    assert loss_loop(exponentials=7)["element_loops"] == []


def test_fences_are_counted_with_what_they_belong_to():
    fence, load = plain("MEMBAR.ALL.GPU"), plain("LDG.E.STRONG.GPU R4, desc[UR4][R2.64]")
    add, drop = plain("REDG.E.ADD.STRONG.GPU [R2.64], R5"), plain("CCTL.IVALL")
    init, seen = plain("SYNCS.EXCH.64 URZ, [UR6], UR4"), plain("FENCE.VIEW.ASYNC.S")
    apart = [plain("NOP")] * 10
    expected = {"releases": 0, "acquires": 0, "copy_fences": 0, "unfenced_mbarriers": 0}
    for code, change in (
        ([fence, add], {"releases": 1}),
        ([add], {}),  # raise()
        ([add, fence], {}),
        ([load, fence, drop], {"acquires": 1}),
        ([load, drop], {}),
        ([load, *apart, fence, drop], {}),
        ([fence, plain("ATOM.E.ADD.STRONG.GPU R4, [R2]"), drop], {}),  # the grid barrier
        ([plain("FENCE.VIEW.ASYNC.G")], {"copy_fences": 1}),
        ([init, seen, init, seen], {}),
        ([seen, init, *apart], {"unfenced_mbarriers": 1}),
    ):
        assert report_of(*code)["order"] == expected | change, code


def test_a_branch_to_itself_is_no_loop():
    [code] = listing.parse(text_of(plain("BRA 0x0"))).values()
    assert listing.loops(code) == []


def test_what_cannot_be_read_is_an_error():
    text = text_of(plain("NOP")).replace("0x00000000", "oops", 3)
    assert "oops" in text
    broken = "\n".join(line for line in text_of(plain("NOP")).splitlines()[:2])
    with pytest.raises(ValueError, match="without control bits"):
        listing.parse(broken + "\nnothing")


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
    producer = {"cycles": 500, "cycles_with_hidden": 600, "fences": 0}
    producer |= {"per_block": 90, "per_box": 50, "per_hidden_box": 40}
    good = {
        "copy_loops": [copies],
        "consumer_loops": [consumers],
        "finish_loops": [{"rows": 32, "cycles": 850}],
        "global_loops": [projection],
        "membar_sc_in_loops": 0,
        "polls": [],
        "producers": [producer],
    }
    assert limits.violations(good, "bf16") == []
    for change, word in (
        ({"membar_sc_in_loops": 1}, "MEMBAR.SC"),
        ({"producers": []}, "0 loops of a producer"),
        ({"producers": [producer | {"fences": 1}]}, "1 fences in each stage"),
        ({"producers": [producer | {"cycles": 900}]}, "one request, mean: the producer issues"),
        ({"producers": [producer | {"cycles_with_hidden": 1250}]}, "64 requests, full stage"),
        ({"copy_loops": [copies | {"by_lanes": True}]}, "loop over lanes"),
        ({"copy_loops": [copies | {"stall_cycles_per_copy": 300}]}, "cycles per copy"),
        (
            {"consumer_loops": [consumers | {"shared_loads": {"32": 1}}]},
            "shared loads",
        ),
        ({"consumer_loops": [consumers | {"local_accesses": 2}]}, "spilled"),
        ({"finish_loops": [{"rows": 32, "cycles": 3400}]}, "at the end of a unit"),
        ({"global_loops": [projection | {"before_a_wait": 1}]}, "projection"),
    ):
        assert word in "; ".join(limits.violations(good | change, "bf16")), change


# --- what is built --------------------------------------------------------------------------------


@pytest.mark.parametrize("corrects", [0, 1], ids=["full", "correction"])
@pytest.mark.parametrize("format", FORMATS)
def test_streaming_kernels_keep_their_limits(library_report, of_these_sources, format, corrects):
    one = library_report[f"stream_kernel<{format}, 1, {corrects}>"]
    assert limits.violations(one, format) == []
    rate = prediction.kernel_of(one, format).consumer_bytes_per_clock
    assert rate >= prediction.least_consumer_rate(), "consumers are slower than memory"


@pytest.mark.parametrize("pass_name", ["loss_rows_kernel", "loss_rows_backward_kernel"])
def test_kernels_of_the_loss_keep_their_limits(library_report, of_these_sources, pass_name):
    stores = pass_name == "loss_rows_backward_kernel"
    assert limits.loss_violations(library_report[pass_name], stores) == []


def most_in_flight(one, bits):
    """Loads of that width that a loop without products issues before it waits for the first."""
    loops = (loop for loop in one["global_loops"] if loop["bits"] == bits and not loop["products"])
    return max(loop["before_a_wait"] for loop in loops)


@pytest.mark.parametrize("format", FORMATS)
def test_loads_are_in_flight_together(library_report, format):
    """Hidden states of a step (sixteen bytes), and parts and keys of the token (eight bytes)."""
    one = library_report[f"stream_kernel<{format}, 1, 0>"]
    assert most_in_flight(one, 128) >= 8 and most_in_flight(one, 64) >= 16


@pytest.mark.parametrize("corrects", [0, 1], ids=["full", "correction"])
def test_the_plain_kernel_loads_sixteen_bytes(library_report, corrects):
    """Where the rows are aligned: eight loads of weights, and those of hidden states."""
    assert most_in_flight(library_report[f"decode_step_kernel<1, {corrects}>"], 128) >= 8


def test_no_kernel_fences_where_it_polls(library_report, of_these_sources):
    polls = {name: one["polls"] for name, one in library_report.items()}
    assert all(limits.fence_violations(one) == [] for one in library_report.values())
    for format in FORMATS:
        assert any(poll["of"] == "counter" for poll in polls[f"stream_kernel<{format}, 1, 0>"])


@pytest.mark.parametrize("corrects", [0, 1], ids=["full", "correction"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_signal_and_fence_is_compiled(library_report, of_these_sources, format, corrects):
    """That each is necessary is tested on the host backend, which does not see these instructions.

    Three phases of the gate signal and wait, and alpha is signalled; each of four sizes of a batch
    looks for alpha and waits for it; the producer looks.
    """
    one = library_report[f"stream_kernel<{format}, 1, {corrects}>"]
    assert one["order"] == {
        "releases": 3 + 1, "acquires": 3 + 4 * 2 + 1, "copy_fences": 1, "unfenced_mbarriers": 0
    }  # fmt: skip


@pytest.mark.parametrize("corrects", [0, 1], ids=["full", "correction"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_of_another_copy_engine_traps(library_report, format, corrects):
    """For sm_90a it has no code. It must not end as if it had computed something."""
    other = library_report[f"stream_kernel<{format}, 0, {corrects}>"]
    assert other["traps"] and other["instructions"] < 32
    assert library_report[f"stream_kernel<{format}, 1, {corrects}>"]["instructions"] > 1000


def test_the_report_has_every_hot_kernel(library_report):
    """Every report has copies and products. A pattern that no longer matches would find none."""
    for name in (f"stream_kernel<{format}, 1, {kind}>" for format in FORMATS for kind in (0, 1)):
        one = library_report[name]
        assert one["copy_loops"] and one["consumer_loops"] and one["global_loops"]
        rows = {loop["rows"] for loop in one["finish_loops"]}
        assert rows == ({8, 16, 32} if name.endswith("0>") else set()), "a full head's sums move"
        assert {loop["kind"] for loop in one["copy_loops"]} <= set(machine_code.COPIES)
        assert 100 < one["registers"] <= 255
    others = {"decode_step_kernel<0, 0>", "loss_rows_kernel", "loss_rows_backward_kernel"}
    assert others <= set(library_report)
