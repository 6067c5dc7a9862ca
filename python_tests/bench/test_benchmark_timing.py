# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' timer, with a fake clock, and their description of the machine."""

from __future__ import annotations

import gc
import json
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from dualhead_ext import ops
from dualhead_ext.measurement import machine, timing
from dualhead_ext.measurement.timing import Contender, Timing

ROOT = Path(__file__).resolve().parents[2]


# --- the timer ------------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when told to."""

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
    # The machine's drift, which both share
    drift = numpy.exp(numpy.random.default_rng(seed).normal(size=40))
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
    # Nominally 95 %, and a little more for few repeats. 600 trials have a standard error of 0.9 %.
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


@pytest.mark.parametrize(
    ("vendor", "flags", "kind"),
    [
        ("GenuineIntel", "avx2 avx512bw avx512_bf16 amx_bf16", "intel-amx"),
        ("GenuineIntel", "avx2 avx512bw", "intel-avx512"),
        ("AuthenticAMD", "avx2 avx512bw avx512_bf16", "amd-avx512bf16"),
        ("AuthenticAMD", "fma avx2", "amd-avx2"),
        ("AuthenticAMD", "sse2", "amd-portable"),
    ],
)
def test_the_kind_of_a_processor(vendor, flags, kind, tmp_path, monkeypatch):
    text = (
        f"vendor_id\t: {vendor}\nmodel name\t: A Name\nflags\t\t: {flags}\n\nvendor_id\t: Other\n"
    )
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    found = machine.describe()
    assert (found["kind"], found["device"]) == (kind, "A Name")
    assert set(found["flags"]) == set(flags.split()) - {"sse2"}


def test_the_best_of_several_read_loops_counts():
    timings = {"slow": Timing("slow", (4.0, 5.0, 6.0)), "fast": Timing("fast", (2.0, 9.0, 1.0))}
    found = machine.best_read(10_000, timings)
    assert (found.method, found.gb_per_s) == ("fast", 5.0)
    assert found.methods == {"slow": 2.0, "fast": 5.0}


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
