# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' cases: the bytes and ratios that they report, and contenders that must agree.

They run on tiny sizes, with the real operator.
"""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from benchmark_cases import EFFORT, READ, STEADY, TINY, case_result

from dualhead_ext import ops, reference
from dualhead_ext.bench import cases, contenders, decode, plot, report
from dualhead_ext.measurement import machine, timing
from dualhead_ext.quantization import FORMATS

# --- the decode step ------------------------------------------------------------------------------


def bytes_by_hand(d, V, B, T, itemsize, heads=8, head_dim=48):
    """Bytes that one step reads: heads, W_Q, W_K, folded rows; keys, values and their validity."""
    weights = (2 * V * d + 2 * heads * head_dim * d) * itemsize + heads * d * 4
    return weights + B * T * (heads * head_dim * itemsize + heads * 4 + 1)


@pytest.mark.parametrize("format_name", ["fp32", "bf16"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_case_times_all_contenders(format_name, sampled):
    group = cases.Group(40, 77, format_name, ())
    itemsize = 4 if format_name == "fp32" else 2
    operands = contenders.Operands(group, cold_bytes=500_000)
    # The bytes of the cache count as well, so there are fewer copies than of the weights alone.
    result = decode.run_case(
        cases.Case(2, 9, sampled), operands, decode.Effort(0.0, 500_000, 2**40, min_rounds=4)
    )
    whole = bytes_by_hand(40, 77, 2, 9, itemsize)
    assert result.num_bytes == {"dualhead": whole, "eager": whole, "lm_head": 77 * 40 * itemsize}
    assert len(operands.copies) == -(-500_000 // operands.num_bytes)
    assert result.copies == -(-500_000 // whole) < len(operands.copies)
    rows = result.rows(READ)
    assert [row["contender"] for row in rows] == ["dualhead", "eager", "lm_head"]
    for row in rows:
        assert row["repeats"] == 4
        assert 0 < row["us_q1"] <= row["us_median"] <= row["us_q3"]
        assert row["sampled"] is sampled
        share = row["bytes"] / (row["us_median"] * 1e-6) / 10e9
        assert row["share_of_read_bandwidth"] == pytest.approx(share)
    json.dumps(rows)


def test_plain_reads_take_turns_with_the_steps(monkeypatch):
    """The share refers to the best read bandwidth measured in the same rounds.

    The results do not list the loops.
    """
    operands = contenders.Operands(TINY, 200_000)
    seen, real = [], machine.read_loops
    rate = 1e-3  # GB/s; even an empty call on a busy machine is faster
    before = machine.ReadBandwidth(rate, READ.method, {READ.method: rate})

    def spy(buffer):
        num_bytes, loops = real(buffer)
        assert num_bytes <= buffer.nbytes < num_bytes + 4 * 4096
        return num_bytes, {n: timing.Contender(n, lambda copy, n=n: seen.append(n)) for n in loops}

    monkeypatch.setattr(decode, "read_loops", spy)
    result = decode.run_case(TINY.cases[0], operands, EFFORT, before)
    # 2 more for the warm-up
    assert set(seen) == set(result.read.methods) and len(result.read.methods) == 4
    assert all(seen.count(name) == EFFORT.min_rounds + 2 for name in result.read.methods)
    assert list(result.timings) == list(result.num_bytes) == ["dualhead", "eager", "lm_head"]
    assert result.read.gb_per_s == max(result.read.methods.values()) > rate
    assert decode.run_case(TINY.cases[0], operands, EFFORT).read is None


def test_quantised_heads_take_part(monkeypatch):
    """Their bytes are counted by hand, and each call gets the next of their own copies."""
    seen = {}

    def spy(**arguments):
        if "lm_scale" in arguments:
            seen.setdefault(arguments["lm_weight"].dtype, []).append(arguments["lm_weight"])
        return step(**arguments)

    step = ops.decode_step
    monkeypatch.setattr(contenders.ops, "decode_step", spy)
    group = cases.Group(128, 77, "bf16", ())
    operands = contenders.Operands(group, cold_bytes=500_000)
    case, effort = cases.Case(2, 9, quantized=True), decode.Effort(0.0, 500_000, 2**40, 4)
    result = decode.run_case(case, operands, effort)
    assert list(result.timings) == ["dualhead", "eager", "lm_head", *FORMATS]
    gate = bytes_by_hand(128, 0, 2, 9, 2) + 4  # b_g
    per_row = {"int8": 128 + 4, "fp8": 128 + 4, "int4": 64 + 4}
    for name, weight_format in FORMATS.items():
        assert result.num_bytes[name] == gate + 2 * 77 * per_row[name]
        used = [weight.data_ptr() for weight in seen[weight_format.dtype]]
        count = -(-500_000 // (result.num_bytes[name] - contenders.cache_bytes(group, case)))
        assert len(used) == 1 + 2 + 4 and len(set(used)) == min(count, 7)
        assert used[0] != used[1]


def test_a_wrong_quantised_contender_is_not_timed(monkeypatch):
    def broken(**arguments):
        out = ops_step(**arguments)
        return out._replace(logits=out.logits * 2) if "lm_scale" in arguments else out

    ops_step = ops.decode_step
    monkeypatch.setattr(contenders.ops, "decode_step", broken)
    operands = contenders.Operands(cases.Group(128, 77, "bf16", ()), 1)
    with pytest.raises(RuntimeError, match=r"int8 and eager differ by .* in logits"):
        decode.run_case(cases.Case(2, 9, quantized=True), operands, EFFORT)


def test_every_step_has_t_columns():
    """A step appends to the cache that it reads. From call to call, the cache must not grow."""
    seen = []

    def spy(**arguments):
        seen.append(arguments["cache_length"].tolist())
        return reference.decode_step(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders.ops, "decode_step", spy)
        decode.run_case(cases.Case(2, 9), contenders.Operands(TINY, 1), EFFORT)
    assert len(seen) == 1 + 2 + 3  # agreement, warm-up, rounds
    assert seen == [[8, 8]] * 6


@pytest.mark.parametrize(("format_name", "freeze"), [("fp32", True), ("bf16", False)])
def test_the_compiled_contender_takes_part(format_name, freeze, monkeypatch):
    """Without autotuning, which would take longer than all the other tests here together."""
    monkeypatch.setattr(contenders, "_COMPILE_OPTIONS", {})
    group = cases.Group(40, 77, format_name, ())
    operands = contenders.Operands(group, cold_bytes=400_000)
    effort = decode.Effort(0.0, 400_000, 1 if freeze else 2**40, min_rounds=3)
    result = decode.run_case(cases.Case(2, 9, compile=True), operands, effort)
    assert result.copies > 1
    assert list(result.timings) == ["dualhead", "eager", "compile", "lm_head"]
    rows = {row["contender"]: row["compile_options"] for row in result.rows(READ)}
    assert rows.pop("compile") == ("max-autotune, freezing" if freeze else "max-autotune")
    assert set(rows.values()) == {None}
    assert not torch._inductor.config.freezing


def test_weights_to_freeze_share_no_storage():
    """The operands share storage.

    With autotuning and freezing, inductor would mix up their rows.
    """
    weights = contenders.Operands(TINY, 1).copies[0]
    frozen = dict(contenders._Step(weights).named_buffers())
    assert len({weight.untyped_storage().data_ptr() for weight in frozen.values()}) == len(weights)
    for name, weight in weights.items():
        assert torch.equal(frozen[name], weight)


@pytest.mark.parametrize("wrong", ["alpha", "logits"])
def test_a_wrong_contender_is_not_timed(wrong, monkeypatch):
    def broken(**arguments):
        out = reference.decode_step(**arguments)
        return out._replace(**{wrong: getattr(out, wrong) * torch.nan})

    monkeypatch.setattr(contenders.ops, "decode_step", broken)
    with pytest.raises(RuntimeError, match=f"dualhead and eager differ by nan in {wrong}"):
        decode.run_case(cases.Case(2, 9), contenders.Operands(TINY, 1), EFFORT)


def test_nothing_is_timed_without_a_kernel(monkeypatch):
    monkeypatch.setattr(decode.ops, "kernel_for", lambda device, dtype: False)
    with pytest.raises(RuntimeError, match="no compiled CPU kernel for bf16"):
        decode.run_case(cases.Case(2, 9), contenders.Operands(TINY, 1), EFFORT)


FLAGSHIP = cases.Group(4096, 32000, "bf16", ())


@pytest.mark.parametrize(
    ("group", "case", "speedup", "fails"),
    [
        (TINY, TINY.cases[0], 1.05, False),
        (TINY, TINY.cases[0], 0.9, True),
        (FLAGSHIP, cases.Case(1, 256), 1.55, False),
        (FLAGSHIP, cases.Case(1, 256), 1.45, True),
        (FLAGSHIP, cases.Case(4, 256), 1.45, False),
        (FLAGSHIP, cases.Case(1, 256, sampled=True), 0.9, True),
    ],
)
def test_too_slow_fails(group, case, speedup, fails):
    result = case_result(group, case, STEADY, [us * speedup for us in STEADY])
    failure = result.failure(READ)
    assert (failure is not None) == fails
    if fails:
        assert f"{group} B={case.B}" in failure
        assert f"{speedup:.2f} times as long" in failure


def test_at_the_machines_limit_no_speedup_is_required():
    """1000 bytes in 10 us are 0.1 GB/s, the machine's limit here."""
    result = case_result(FLAGSHIP, cases.Case(1, 256), [10.0] * 20, [12.0] * 20)
    limit = 0.1 / cases.SHARE_AT_THE_LIMIT
    for rate, fails in ((limit * 1.01, True), (limit * 0.99, False)):
        assert (result.failure(machine.ReadBandwidth(rate, "sum", {})) is not None) == fails


def test_a_draw_does_not_fail_by_chance(seed):
    """The ratio of medians is below 1, but within the noise."""
    noise = numpy.random.default_rng(seed).lognormal(sigma=0.2, size=(2, 31))
    eager = noise[1] * numpy.median(noise[0]) / numpy.median(noise[1]) * 0.99
    result = case_result(TINY, TINY.cases[0], noise[0], eager)
    got = result.speedup("eager")
    assert got.value == pytest.approx(0.99)
    assert got.low < 0.99 < got.high
    assert (result.failure(READ) is None) == (got.high >= 1)


def test_the_plans_hold_what_was_promised():
    full, quick = cases.plan(), cases.plan(quick=True)
    assert {(g.d, g.V) for g in full} == set(cases.SIZES)
    assert {g.format for g in full} == {"fp32", "bf16"}
    for group in full:
        kinds = {(case.B, case.sampled) for case in group.cases}
        assert kinds >= {(1, False), (4, False), (8, False), (1, True)}
        assert len({case.T for case in group.cases}) > 1
        assert any(case.compile for case in group.cases)
    for groups in (full, quick):
        required = [cases.required_speedup(g, c) for g in groups for c in g.cases]
        assert sorted(set(required)) == [1.0, 1.5]
        assert required.count(1.5) == 1


def test_quantised_heads_are_in_the_full_plan():
    assert tuple(FORMATS) == report.QUANTIZED
    found = [(g.d, g.V, c.B) for g in cases.plan() for c in g.cases if c.quantized]
    assert found == [(4096, 32000, 1), (4096, 32000, 8)]


def test_the_growth_plan_has_a_line_along_each_axis():
    rows = [
        {"contender": "dualhead", "V": g.V, "T": c.T, "B": c.B}
        for g in cases.growth_plan()
        for c in g.cases
    ]
    lines = {
        axis: [row[axis] for row in plot.growth_line(rows, axis, "dualhead")] for axis in "VTB"
    }
    assert lines["V"] == [2000, 4000, 8000, 16000, 32000]
    assert lines["T"] == [64, 256, 1024, 2048, 4096]
    assert lines["B"] == [1, 2, 4, 8, 16, 32, 64]
