# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own machinery: the timer on a clock of its own, the bytes and ratios it reports,
contenders that must agree, the two front ends; on tiny sizes, with the real operator."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch

from dualhead_ext import bench, ops, reference
from dualhead_ext.bench import decode, generation, machine, report, runner, timing
from dualhead_ext.bench.timing import Contender, Timing

ROOT = Path(__file__).resolve().parents[1]
TINY = decode.Group(40, 77, "bf16", (decode.Case(2, 9), decode.Case(1, 5, sampled=True)))
EFFORT = decode.Effort(seconds=0.0, cold_bytes=1, cache_bytes=2**40, min_rounds=3)
READ = machine.ReadBandwidth(10.0, "sum of fp32", {"sum of fp32": 10.0})


# --- the timer ------------------------------------------------------------------------------------


class Clock:
    """A clock that moves when told to."""

    def __init__(self, monkeypatch):
        self.ns = 0
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.ns / 1e9)

    def sleep(self, us):
        self.ns += round(us * 1000)


def test_contenders_take_turns(monkeypatch):
    clock, log = Clock(monkeypatch), []

    def contender(name, us):
        def call(copy):
            log.append((name, copy))
            clock.sleep(us)

        return Contender(name, call, lambda copy: clock.sleep(1000))  # preparing is not timed

    timings = timing.alternate(
        [contender("a", 2), contender("b", 3), contender("c", 5)],
        seconds=0,
        copies=4,
        min_rounds=4,
        warmup=1,
    )
    assert {name: t.us for name, t in timings.items()} == {
        "a": (2.0,) * 4,
        "b": (3.0,) * 4,
        "c": (5.0,) * 4,
    }
    assert len(log) == 3 * 5
    rounds = ["".join(name for name, _ in log[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds[:3])) == 3, "the order must shift from round to round"
    assert [copy for _, copy in log] == [turn % 4 for turn in range(15)]


@pytest.mark.parametrize(
    ("seconds", "limits", "rounds"),
    [(0.0, (5, 100), 5), (0.02, (5, 100), 20), (9.0, (5, 7), 7)],
)
def test_the_budget_ends_the_rounds(monkeypatch, seconds, limits, rounds):
    clock = Clock(monkeypatch)
    timings = timing.alternate(
        [Contender("a", lambda copy: clock.sleep(1000))],
        seconds=seconds,
        min_rounds=limits[0],
        max_rounds=limits[1],
        warmup=3,
    )
    assert timings["a"].repeats == rounds


def test_the_timer_refuses_what_it_cannot_time():
    same = [Contender("a", print), Contender("a", print)]
    for contenders in ([], same):
        with pytest.raises(ValueError, match="contenders must be at least one and differ"):
            timing.alternate(contenders, seconds=0)
    for rounds in ({"min_rounds": 1}, {"min_rounds": 5, "max_rounds": 4}):
        with pytest.raises(ValueError, match="2 <= min_rounds <= max_rounds"):
            timing.alternate(same[:1], seconds=0, **rounds)


def test_garbage_waits_and_is_collected_again_after_an_error():
    import gc

    seen = []

    def fail(copy):
        seen.append(gc.isenabled())
        raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        timing.alternate([Contender("a", fail)], seconds=0)
    assert seen == [False]
    assert gc.isenabled()


def test_quartiles_are_numpy_s(seed):
    us = numpy.random.default_rng(seed).lognormal(size=18)
    t = Timing("a", tuple(us))
    expected = numpy.quantile(us, [0.25, 0.5, 0.75])
    numpy.testing.assert_allclose([t.us_q1, t.us_median, t.us_q3], expected)


def test_ratio_cancels_drift(seed):
    drift = numpy.exp(numpy.random.default_rng(seed).normal(size=40))  # the machine's, shared
    got = timing.ratio(Timing("a", tuple(3.0 * drift)), Timing("b", tuple(2.0 * drift)))
    assert got.value == pytest.approx(1.5)
    assert got.low == pytest.approx(1.5)
    assert got.high == pytest.approx(1.5)


@pytest.mark.parametrize("repeats", [15, 40, 101])
def test_the_interval_covers_the_true_ratio(repeats, seed):
    generator = numpy.random.default_rng(seed)
    inside, trials = 0, 600
    for _ in range(trials):
        slower = 2.0 * generator.lognormal(sigma=0.3, size=repeats)
        faster = generator.lognormal(sigma=0.3, size=repeats)
        got = timing.ratio(Timing("a", tuple(slower)), Timing("b", tuple(faster)))
        inside += got.low <= 2.0 <= got.high
    # Nominal 95 %, a little more for few repeats; 600 trials are good to 0.9 % (one sigma).
    assert 0.92 <= inside / trials <= 0.99


def test_few_repeats_give_the_whole_range():
    got = timing.ratio(Timing("a", (1.0, 4.0, 3.0)), Timing("b", (1.0, 1.0, 1.0)))
    assert (got.value, got.low, got.high) == (3.0, 1.0, 4.0)


def test_copies_span_what_cold_means():
    assert [timing.copies_needed(n, 100) for n in (1, 33, 34, 50, 100, 1000)] == [
        *(100, 4, 3, 2, 1, 1)
    ]


# --- the machine ----------------------------------------------------------------------------------


def test_the_machine_is_described():
    found = json.loads(json.dumps(machine.describe()))
    missing = {name for name, value in found.items() if value in (None, "")}
    assert missing <= {"cuda"}
    assert found["isa"] == ops.cpu_isa()
    assert found["threads"] == torch.get_num_threads()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    if head.returncode == 0:
        assert found["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_cold_is_four_caches_or_a_quarter_of_what_is_free(monkeypatch):
    free = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine.os, "sysconf", free.__getitem__)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1000)
    assert machine.cold_bytes() == 4000
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 2**30)
    assert machine.cold_bytes() == 1_024_000


def test_the_largest_cache_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.last_level_cache_bytes() == 64 * 2**20
    for index, size in enumerate(["48K", "2048K", "260M\n"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    assert machine.last_level_cache_bytes() == 260 * 2**20


def test_read_bandwidth_is_the_best_median(monkeypatch):
    rates = iter([4.0, 2.0, 1.0, 8.0])  # microseconds, in the order of the methods

    def fake(contenders, **options):
        for contender in contenders:
            contender.call(0)
        return {c.name: Timing(c.name, (next(rates),) * 3) for c in contenders}

    monkeypatch.setattr(machine, "alternate", fake)
    buffer = torch.zeros(3, 5, 4096)[:2]  # 160 KiB
    got = machine.read_bandwidth(buffer)
    assert got.method == "dot product"
    assert got.gb_per_s == pytest.approx(2 * 5 * 4096 * 4 / 1e-6 / 1e9)
    assert got.share(num_bytes=500, us=1.0) == pytest.approx(0.5 / got.gb_per_s)


def test_read_bandwidth_reads_any_dtype():
    got = machine.read_bandwidth(torch.ones(3, 2**18, dtype=torch.bfloat16), seconds=0)
    assert len(got.methods) == 4
    assert 0 < got.gb_per_s == max(got.methods.values())
    with pytest.raises(ValueError, match="buffer must have 16384 bytes or more, got 400"):
        machine.read_bandwidth(torch.ones(100))


# --- the decode step ------------------------------------------------------------------------------


def bytes_by_hand(d, V, B, T, itemsize, heads=8, head_dim=48):
    """What one step reads: heads, W_Q and W_K, folded rows; keys, values and their validity."""
    weights = (2 * V * d + 2 * heads * head_dim * d) * itemsize + heads * d * 4
    return weights + B * T * (heads * head_dim * itemsize + heads * 4 + 1)


@pytest.mark.parametrize("format_name", ["fp32", "bf16"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_case_times_all_contenders(format_name, sampled):
    group = decode.Group(40, 77, format_name, ())
    itemsize = 4 if format_name == "fp32" else 2
    operands = decode.Operands(group, cold_bytes=500_000)
    # The cache's bytes count as well, so fewer copies of both than of the weights alone.
    result = decode.run_case(
        decode.Case(2, 9, sampled), operands, decode.Effort(0.0, 500_000, 2**40, min_rounds=4)
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


def test_every_step_has_t_columns():
    """Steps append to the cache they read; it must not fill up, nor grow, from call to call."""
    seen = []

    def spy(**arguments):
        seen.append(arguments["cache_length"].tolist())
        return reference.decode_step(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.ops, "decode_step", spy)
        decode.run_case(decode.Case(2, 9), decode.Operands(TINY, 1), EFFORT)
    assert len(seen) == 1 + 2 + 3  # agreement, warm-up, rounds
    assert seen == [[8, 8]] * 6


@pytest.mark.parametrize(("format_name", "freeze"), [("fp32", True), ("bf16", False)])
def test_the_compiled_contender_takes_part(format_name, freeze, monkeypatch):
    """Frozen weights come out right too, though the operands are views of one storage. (Without
    autotuning, which takes longer than all tests here.)"""
    monkeypatch.setattr(decode, "_COMPILE_OPTIONS", {})
    group = decode.Group(40, 77, format_name, ())
    operands = decode.Operands(group, cold_bytes=400_000)
    effort = decode.Effort(0.0, 400_000, 1 if freeze else 2**40, min_rounds=3)
    result = decode.run_case(decode.Case(2, 9, compile=True), operands, effort)
    assert result.copies > 1
    assert list(result.timings) == ["dualhead", "eager", "compile", "lm_head"]
    rows = {row["contender"]: row["compile_options"] for row in result.rows(READ)}
    assert rows.pop("compile") == ("max-autotune, freezing" if freeze else "max-autotune")
    assert set(rows.values()) == {None}
    assert not torch._inductor.config.freezing


@pytest.mark.parametrize("wrong", ["alpha", "logits"])
def test_a_wrong_contender_is_not_timed(wrong, monkeypatch):
    def broken(**arguments):
        out = reference.decode_step(**arguments)
        return out._replace(**{wrong: getattr(out, wrong) * torch.nan})

    monkeypatch.setattr(decode.ops, "decode_step", broken)
    with pytest.raises(RuntimeError, match=f"dualhead and eager differ by nan in {wrong}"):
        decode.run_case(decode.Case(2, 9), decode.Operands(TINY, 1), EFFORT)


def test_nothing_is_timed_without_a_kernel(monkeypatch):
    monkeypatch.setattr(decode.ops, "kernel_for", lambda device, dtype: False)
    with pytest.raises(RuntimeError, match="no compiled CPU kernel for bf16"):
        decode.run_case(decode.Case(2, 9), decode.Operands(TINY, 1), EFFORT)


def case_result(group, case, dualhead, eager):
    """A result with these microseconds."""
    timings = {n: Timing(n, tuple(us)) for n, us in (("dualhead", dualhead), ("eager", eager))}
    return decode.CaseResult(group, case, timings, dict.fromkeys(timings, 1000), 1, None)


FLAGSHIP = decode.Group(4096, 32000, "bf16", ())
STEADY = [10.0 + i % 3 for i in range(30)]


@pytest.mark.parametrize(
    ("group", "case", "speedup", "fails"),
    [
        (TINY, TINY.cases[0], 1.05, False),
        (TINY, TINY.cases[0], 0.9, True),
        (FLAGSHIP, decode.Case(1, 256), 1.55, False),
        (FLAGSHIP, decode.Case(1, 256), 1.45, True),
        (FLAGSHIP, decode.Case(4, 256), 1.45, False),
        (FLAGSHIP, decode.Case(1, 256, sampled=True), 0.9, True),
    ],
)
def test_too_slow_fails(group, case, speedup, fails):
    result = case_result(group, case, STEADY, [us * speedup for us in STEADY])
    failure = result.failure()
    assert (failure is not None) == fails
    if fails:
        assert f"{group} B={case.B}" in failure
        assert f"{speedup:.2f} times as long" in failure


def test_a_draw_does_not_fail_by_chance(seed):
    """Ratio of medians below 1, but so is the noise."""
    noise = numpy.random.default_rng(seed).lognormal(sigma=0.2, size=(2, 31))
    eager = noise[1] * numpy.median(noise[0]) / numpy.median(noise[1]) * 0.99
    result = case_result(TINY, TINY.cases[0], noise[0], eager)
    got = result.speedup("eager")
    assert got.value == pytest.approx(0.99)
    assert got.low < 0.99 < got.high
    assert (result.failure() is None) == (got.high >= 1)


def test_the_plans_hold_what_was_promised():
    full, quick = decode.plan(), decode.plan(quick=True)
    assert {(g.d, g.V) for g in full} == set(decode.SIZES)
    assert {g.format for g in full} == {"fp32", "bf16"}
    for group in full:
        cases = {(case.B, case.sampled) for case in group.cases}
        assert cases >= {(1, False), (4, False), (8, False), (1, True)}
        assert len({case.T for case in group.cases}) > 1
        assert any(case.compile for case in group.cases)
    for groups in (full, quick):
        required = [decode.required_speedup(g, c) for g in groups for c in g.cases]
        assert sorted(set(required)) == [1.0, 1.5]
        assert required.count(1.5) == 1


# --- whole models ---------------------------------------------------------------------------------


def test_whole_models_decode_with_each_step(monkeypatch):
    calls = []

    def spy(name, step):
        def call(**arguments):
            calls.append(name)
            return step(**arguments)

        return call

    monkeypatch.setattr(generation.ops, "decode_step", spy("fused", ops.decode_step))
    monkeypatch.setattr(generation.reference, "decode_step", spy("eager", reference.decode_step))
    model = generation.tiny_model()
    result = generation.run_model(model, seconds=0, min_rounds=2)
    # The first token comes from the prompt's pass; three calls each, one to warm up.
    expected = 3 * (model.new_tokens - 1)
    assert (calls.count("fused"), calls.count("eager")) == (expected, expected)
    rows = {row["contender"]: row for row in result.rows()}
    assert list(rows) == ["backbone", "dualhead", "eager"]
    for name, row in rows.items():
        seconds = result.timings[name].us_median / 1e6
        assert row["tokens_per_s_median"] == pytest.approx(model.new_tokens / seconds)
        assert row["tokens_per_s_q1"] <= row["tokens_per_s_median"] <= row["tokens_per_s_q3"]
        assert row["format"] == "bf16"
    assert "tokens/s" in result.text()


# --- reports and front ends -----------------------------------------------------------------------


def tiny_report():
    """A report of one real group, and what was printed."""
    found, printed = report.Report({**machine.describe()}), []
    operands = decode.Operands(TINY, EFFORT.cold_bytes)
    printed.append(report.group_lines(operands, EFFORT, READ))
    for case in TINY.cases:
        printed.append(found.add(decode.run_case(case, operands, EFFORT), READ))
    return found, "\n".join(printed)


def test_a_report_survives_the_file(tmp_path):
    found, printed = tiny_report()
    assert "40x77-bf16" in printed
    assert "NOT COLD" in printed
    path = tmp_path / "results.json"
    found.write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    results = report.load(path)
    assert results == json.loads(json.dumps(found.as_json()))
    assert {"device", "torch", "cuda", "commit", "csrc_sha256", "isa"} <= results.keys()
    assert results["read_gb_per_s"] == READ.gb_per_s
    columns = {"contender", "format", "d", "V", "B", "T", "sampled", "us_median", "us_q1", "us_q3"}
    assert all(columns | {"repeats"} <= row.keys() for row in results["cases"])
    assert len(results["cases"]) == 6
    table = report.markdown(results).splitlines()
    assert sum(line.startswith("| 40 x 77 | bf16 |") for line in table) == 2
    ours, eager = results["cases"][:2]
    assert f"{eager['us_median'] / ours['us_median']:.2f}x" in table[2]
    assert all(line.count("|") == 11 for line in table[:4])


def test_a_failure_is_reported():
    found = report.Report({})
    text = found.add(case_result(TINY, TINY.cases[0], STEADY, [us / 2 for us in STEADY]), READ)
    assert "TOO SLOW: 40x77-bf16" in text
    assert len(found.as_json()["failures"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "must be JSON"), ("[]", "must be a results file"), ("{}", "must be a results file")],
)
def test_a_foreign_file_is_no_report(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        report.load(path)


@pytest.mark.parametrize(
    ("seconds", "json_path", "error", "message"),
    [
        (-1.0, None, ValueError, "seconds must be at least 0 and finite, got -1"),
        (float("nan"), None, ValueError, "seconds must be at least 0 and finite, got nan"),
        (None, "no/such/folder/x.json", FileNotFoundError, "no/such/folder/x.json"),
        (None, ".", IsADirectoryError, "must not be a folder"),
    ],
)
def test_options_are_refused_before_anything_runs(seconds, json_path, error, message):
    with pytest.raises(error, match=message):
        bench.check_options(seconds, json_path)


def command_line(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(arguments))


def test_the_command_runs_writes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "plan", lambda quick: [TINY])
    monkeypatch.setattr(generation, "plan", lambda quick: [generation.tiny_model()])
    monkeypatch.setattr(runner.machine, "cold_bytes", lambda: 2**20)
    monkeypatch.setattr(decode, "required_speedup", lambda group, case: 0.01)
    path = str(tmp_path / "results.json")
    assert command_line("--seconds", "0", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "40x77-bf16" in printed
    assert "tokens/s" in printed
    results = report.load(path)
    assert len(results["cases"]) == 6
    assert len(results["generate"]) == 3
    monkeypatch.setattr(decode, "plan", None)  # nothing runs now
    assert command_line("--report", path) == 0
    assert "random Llama" in capsys.readouterr().out


def test_the_command_fails_where_the_step_is_too_slow(monkeypatch, capsys):
    monkeypatch.setattr(decode, "plan", lambda quick: [TINY])
    monkeypatch.setattr(generation, "plan", lambda quick: [])
    monkeypatch.setattr(runner.machine, "cold_bytes", lambda: 2**20)
    monkeypatch.setattr(decode, "required_speedup", lambda group, case: 1e9)
    assert command_line("--seconds", "0") == 1
    assert capsys.readouterr().out.count("\ntoo slow: ") == 2


TINY_SESSION = """
    import sys
    sys.path.insert(0, {build!r})
    import libraries, pytest
    from dualhead_ext.bench import decode, generation, machine, runner
    cases = (decode.Case(2, 9), decode.Case(1, 5, sampled=True))
    decode.plan = lambda quick: [decode.Group(40, 77, name, cases) for name in ("fp32", "bf16")]
    decode.required_speedup = lambda group, case: {required}[group.format]
    generation.plan = lambda quick: [generation.tiny_model()]
    machine.cold_bytes = lambda: 2**20
    real = machine.describe()
    machine.describe = lambda: real | dict(csrc_sha256={csrc_hash})
    sys.exit(pytest.main(["--benchmark", "--benchmark-seconds", "0", *sys.argv[1:]]))
"""


def pytest_session(*arguments, required, csrc_hash="libraries.csrc_hash()"):
    """``pytest --benchmark`` from the root, over tiny groups."""
    source = textwrap.dedent(TINY_SESSION).format(
        build=str(ROOT / "_build"), required=required, csrc_hash=csrc_hash
    )
    # -k: should collection ever go wrong, it must not run this file from within itself.
    arguments = ("-p", "no:cacheprovider", "-k", "test_decode_step or test_generate", *arguments)
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_pytest_benchmark_from_the_root(tmp_path):
    """One group is fast enough and one is not: the figures of both are printed and written."""
    path = tmp_path / "results.json"
    done = pytest_session(f"--benchmark-json={path}", required={"fp32": 0.01, "bf16": 1e9})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "_ test_decode_step[40x77-bf16] _" in done.stdout
    assert "deselected" not in done.stdout, "tests were collected beside the benchmarks"
    for text in ("40x77-fp32: ", "40x77-bf16: ", "dualhead", "eager", "lm_head", "tokens/s"):
        assert text in done.stdout
    results = report.load(path)
    assert len(results["cases"]) == 12
    assert len(results["generate"]) == 3
    assert len(results["failures"]) == 2


def test_a_stale_build_is_not_timed():
    done = pytest_session(required={"fp32": 0.01, "bf16": 0.01}, csrc_hash="'0' * 64")
    assert done.returncode == 1
    assert "csrc/ has changed since it was compiled" in done.stdout
    assert "3 errors" in done.stdout
    assert "quartiles" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark-seconds=0"], "--benchmark-seconds needs --benchmark"),
        (["--benchmark", "--benchmark-json=no/such/x.json"], "in a folder that exists"),
    ],
)
def test_options_of_pytest(arguments, message):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "benchmarks"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr
