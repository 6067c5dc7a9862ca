# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's code path, run on the CPU: contenders, clock and results file.

One test fails if a document quotes GPU figures that were measured on other sources.
"""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from build_backend import ROOT, libraries
from test_benchmark_reports import command_line

from dualhead_ext import reference
from dualhead_ext.bench import (
    cases,
    contenders,
    decode,
    generation,
    graphs,
    loss_cases,
    plot,
    report,
    runner,
    training_cases,
)
from dualhead_ext.measurement import machine, timing

CASES = (
    cases.Case(2, 9, graphs=True, quantized=True),
    cases.Case(3, 5, sampled=True, graphs=True),
)
GROUP = cases.Group(128, 77, "bf16", CASES)
LOSS = loss_cases.LossCase(24, 77, "bf16", tokens=32, pairs=2, compile=False)
NAMES = ["dualhead", "eager", "two_gemms", "one_gemm", "lm_head"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results file of a complete run on the CPU."""
    path = tmp_path_factory.mktemp("run") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "gpu_plan", lambda quick: [GROUP])
        patch.setattr(loss_cases, "gpu_plan", lambda quick: [LOSS])
        patch.setattr(runner, "GPU_ROUNDS", 4)
        patch.setattr(machine, "cold_bytes", lambda device: 2**20)
        patch.setattr(machine, "last_level_cache_bytes", lambda device="cpu": 2**18)
        runner.run_gpu(True, 0.0, lambda text: None, str(path), device_type="cpu")
    return report.load(path)


def gpu(results, **changes):
    """The same results, as if they came from a GPU."""
    added = {"driver": "580.1", "device": "Made Up 9000", "csrc_sha256": libraries.csrc_hash()}
    return results | added | changes


def test_the_run_on_the_cpu_has_all_contenders(results):
    rows, formats = results["cases"], ["int8", "fp8", "int4"]
    assert [row["contender"] for row in rows] == NAMES + len(formats) * ["dualhead"] + NAMES
    assert [row["format"] for row in rows if row["format"] != "bf16"] == formats
    needed = {"format", "d", "V", "B", "T", "sampled", "us_median", "us_q1", "us_q3"}
    assert all(needed <= row.keys() for row in rows)
    assert all((row["repeats"], row["calls"]) == (4, 1) for row in rows)
    assert results["copy_gb_per_s"] > 0
    assert {"torch", "cuda", "commit", "csrc_sha256", "device"} <= results.keys()


def test_the_loss_is_timed_too(results):
    rows = results["loss"]
    assert {row["contender"] for row in rows} >= {"dualhead", "eager"}
    assert all(row["us_median"] > 0 and row["extra_bytes"] > 0 for row in rows)
    assert {(case.d, case.V) for case in loss_cases.gpu_plan()} == {(4096, 32000), (4096, 128256)}


@pytest.mark.slow
def test_parts_are_run_once_each(tmp_path, monkeypatch):
    """`--part` runs the parts that it names, and nothing else, with the plans of a GPU."""
    path = tmp_path / "results.json"
    settings = {"compile": False, "pairs": 0, "sequences": 4}
    variant = loss_cases.LossCase(24, 77, "bf16", tokens=32, **settings)
    model = generation.tiny_model(generation.GPU_CONTENDERS)
    monkeypatch.setattr(cases, "gpu_plan", None)
    monkeypatch.setattr(loss_cases, "gpu_plan", lambda quick: [LOSS])
    monkeypatch.setattr(loss_cases, "gpu_variants", lambda quick: [variant])
    monkeypatch.setattr(generation, "gpu_plan", lambda quick: [model])
    monkeypatch.setattr(training_cases, "gpu_plan", lambda quick: [training_cases.tiny_case()])
    monkeypatch.setattr(runner, "MODEL_ROUNDS", 2)
    parts = ["loss", "models", "training"]
    runner.run_gpu(True, 0.0, lambda text: None, str(path), device_type="cpu", parts=parts)
    found = report.load(path)
    names = [row["contender"] for row in found["generate"]]
    assert names == list(generation.GPU_CONTENDERS)
    assert {row["repeats"] for row in found["generate"] + found["training"]} == {2}
    assert [row["contender"] for row in found["training"]] == [
        *("forward", "dualhead", "eager", "cached")
    ]
    assert [row["pairs"] for row in found["loss"] if row["contender"] == "dualhead"] == [2, 0]
    assert found["cases"] == [] and "copy_gb_per_s" not in found
    table = report.markdown(gpu(found))
    assert "| 32, in the LM term alone |" in table and "dualhead_static" in table
    assert "| bf16 | cached |" in table and "copy bandwidth not measured" in table


def test_the_loss_compiles_last_and_once():
    _, wanted, _ = runner._gpu_work("loss", False, variants=True)
    assert [case.compile for case in wanted] == [False] * 7 + [True]
    assert len({str(case.settings()) for case in wanted}) == 7


def test_a_quick_run_of_a_part_is_small():
    for plan in (loss_cases.gpu_variants, generation.gpu_plan, training_cases.gpu_plan):
        assert plan(True) != plan(False)


def test_it_writes_after_each_case(tmp_path, monkeypatch):
    """If a case fails in the middle of its group, the file keeps the rows of earlier cases."""
    run_case, path = decode.run_case, tmp_path / "results.json"

    def fails_at_the_second(case, *others):
        if case is CASES[1]:
            raise RuntimeError("no more")
        return run_case(case, *others)

    monkeypatch.setattr(decode, "run_case", fails_at_the_second)
    monkeypatch.setattr(cases, "gpu_plan", lambda quick: [GROUP])
    monkeypatch.setattr(machine, "cold_bytes", lambda device: 2**20)
    monkeypatch.setattr(runner, "GPU_ROUNDS", 4)
    with pytest.raises(RuntimeError, match="no more"):
        runner.run_gpu(True, 0.0, lambda text: None, str(path), device_type="cpu")
    assert len(report.load(path)["cases"]) == 8


def test_the_gpu_plan_holds_what_was_promised():
    plan = [(group, case) for group in cases.gpu_plan() for case in group.cases]
    assert all(case.graphs for _, case in plan)
    assert {case.B for _, case in plan} == {1, 4, 8, 16, 64, 128}
    assert any(case.sampled for _, case in plan)
    compiled = [case.compile for _, case in plan]
    assert any(compiled) and compiled == sorted(compiled), "compiling comes last"
    assert {cases.required_speedup(*pair) for pair in plan} == {1.0}
    assert runner.GPU_ROUNDS >= 100


@pytest.mark.parametrize("stacked", [False, True], ids=["two_gemms", "one_gemm"])
def test_a_gemm_step_is_the_step(stacked):
    operands = contenders.Operands(GROUP, 1)
    case = contenders.requests(GROUP, CASES[0], 1)[0] | operands.copies[0]
    expected = reference.decode_step(**case)
    case["cache_length"].fill_(8)
    got = graphs.gemm_step(case, operands.memory[0] if stacked else None)
    contenders.check_agreement("gemm", got, expected)
    assert torch.equal(got.token, got.logits.argmax(-1))


def test_gumbel_noise_draws_the_distribution():
    from sampling_cases import assert_distribution

    logits = torch.randn(37)
    tokens = graphs.gumbel_token(logits.expand(100_000, -1), torch.full((100_000,), 0.8))
    assert_distribution(tokens, torch.softmax(logits.double() / 0.8, 0))


def test_a_wrong_gemm_is_not_timed(monkeypatch):
    def broken(arguments, stacked=None):
        out = reference.decode_step(**arguments)
        return out._replace(logits=out.logits + (0.0 if stacked is None else 1.0))

    monkeypatch.setattr(contenders, "gemm_step", broken)
    operands = contenders.Operands(GROUP, 1)
    own = contenders.requests(GROUP, CASES[0], 1)
    arguments = [operands.copies[0] | own[0]]
    with pytest.raises(RuntimeError, match="one_gemm and eager differ by 1 in logits"):
        contenders.make_contenders(CASES[0], arguments, operands.copies[0], False, operands.memory)


def test_steps_of_one_round_have_room_in_the_cache():
    """A round has ten calls on a GPU and starts with T - 1 columns; the last finds room in the
    cache.
    """
    assert decode.calls_per_round(2**10) == 10 and decode.calls_per_round(10**11) == 1
    assert decode.calls_per_round(524 * 10**6) == 10 and decode.calls_per_round(2 * 10**9) == 2
    operands, case = contenders.Operands(GROUP, 1), cases.Case(2, 9)
    for steps, full in ((10, False), (9, True)):
        own = contenders.requests(GROUP, case, 1, steps=steps)[0]
        statuses = [reference.decode_step(**operands.copies[0] | own).status for _ in range(10)]
        assert bool(statuses[-1].any()) == full and not torch.stack(statuses[:-1]).any()


def test_the_devices_clock_brackets_the_call(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.name = f"event {sum(word.startswith('new') for word in log)}"
            log.append("new")

        def record(self):
            log.append(f"record {self.name}")

        def synchronize(self):
            log.append(f"wait for {self.name}")

        def elapsed_time(self, end):
            return 0.25  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    clock = timing.clock_of("cuda")
    contender = timing.Contender("a", lambda copy: log.append(f"call {copy}"))
    found = timing.alternate([contender], seconds=0, min_rounds=2, warmup=0, copies=2, clock=clock)
    assert found["a"].us == (250.0, 250.0)
    once = ["sleep", "record event 0", "call 0", "record event 1", "wait for event 1"]
    assert log[2:7] == once and log[9] == "call 1"
    log.clear()
    found = timing.alternate(
        [contender], seconds=0, min_rounds=2, warmup=0, copies=2, calls=3, clock=clock
    )
    assert found["a"].us == (250.0 / 3, 250.0 / 3) and found["a"].calls == 3
    calls = [word for word in log if word.startswith(("call", "record"))]
    assert calls[:5] == ["record event 0", "call 0", "call 1", "call 0", "record event 1"]
    assert calls[6:9] == ["call 1", "call 0", "call 1"]
    assert isinstance(timing.clock_of("cpu"), timing.HostClock)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "run_gpu", None)
    with pytest.raises(ValueError, match=r"device cuda: torch .* finds no CUDA device"):
        command_line("--device", "cuda")


@pytest.mark.parametrize("parts", [None, ["models"], ["loss", "decode"]])
def test_the_parts_of_a_command(parts, monkeypatch):
    """For a GPU, and for the CPU, where the runner passes its default."""
    seen = []

    def run_gpu(quick, seconds, emit, path, parts):
        seen.append(parts)
        return report.Report({})

    def run(quick, seconds, emit, parts="the default", path=None):
        seen.append(parts)
        return report.Report({})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner, "run_gpu", run_gpu)
    monkeypatch.setattr(runner, "run", run)
    options = ["--part", *parts] if parts else []
    assert command_line("--device", "cuda", *options) == command_line(*options) == 0
    assert seen == [parts, parts or "the default"]
    with pytest.raises(SystemExit):
        command_line("--part", "everything")


# --- what is made of the file ---------------------------------------------------------------------


def test_the_table_of_a_gpu(results):
    steps = [{"name": "memcheck", "outcome": "did not run", "seconds": 3.0, "detail": "refused"}]
    lines = report.markdown(gpu(results, steps=steps)).splitlines()
    titles = "eager | torch.compile | two gemms | one gemm | lm_head alone |"
    assert lines[0].endswith(titles)
    ours, eager = results["cases"][:2]
    assert f"| {ours['us_median']:.1f} us |" in lines[2]
    assert f"{eager['us_median'] / ours['us_median']:.2f}x" in lines[2]
    assert all(line.count("|") == 13 for line in lines[:4])
    assert any("driver 580.1" in line for line in lines)
    assert "| memcheck | did not run | 3 | refused |" in lines


def test_a_plot_is_drawn(results, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    source, picture = tmp_path / "made.json", tmp_path / "steps.png"
    source.write_text(json.dumps(gpu(results)))
    assert command_line("--report", str(source), "--plot", str(picture)) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "Made Up 9000" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must hold cases, got none"):
        plot.draw({"device": "x", "cases": []}, picture)
    growth = [row | {"B": 1, "T": 256} for row in results["cases"] if not row["sampled"]]
    source.write_text(json.dumps(results | {"growth": growth}))
    picture = tmp_path / "growth.png"
    assert command_line("--report", str(source), "--plot-growth", str(picture)) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="must hold growth rows, got none"):
        plot.draw_growth(results, picture)


def test_a_plot_needs_a_report_and_matplotlib(results, tmp_path, monkeypatch):
    for option in ("--plot", "--plot-growth"):
        with pytest.raises(ValueError, match=f"^{option} draws .* it needs --report FILE"):
            command_line(option, "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"--plot needs matplotlib: pip install"):
        plot.draw(results, tmp_path / "x.png")


# --- stale figures --------------------------------------------------------------------------------


def quoted_stale_rows(files, documents, csrc_sha256):
    """(sentences, findings).

    A sentence names GPU results that were measured on other sources. A finding is one of their rows
    that a document quotes.
    """
    sentences, findings = [], []
    for path in files:
        results = report.load(path)
        sentence = report.stale(results, csrc_sha256)
        if sentence is None:
            continue
        sentences.append(f"{path.name}: {sentence}")
        rows = {line for line in report.markdown(results).splitlines() if " us |" in line}
        for document in documents:
            lines = rows & set(document.read_text().splitlines())
            findings += [f"{document.name} quotes {path.name}: {line}" for line in sorted(lines)]
    return sentences, findings


def test_no_stale_figure_of_a_gpu_is_quoted():
    """A results file that is older than csrc/ gives a warning. A document that quotes it fails."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    files = [path for path in files if "cases" in json.loads(path.read_text())]
    assert files
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    sentences, findings = quoted_stale_rows(files, documents, libraries.csrc_hash())
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=1)
    assert not findings, "\n".join([*sentences, *findings])


def test_stale_figures_are_found(results, tmp_path):
    path, document = tmp_path / "made-up.json", tmp_path / "README.md"
    path.write_text(json.dumps(gpu(results)))
    table = report.markdown(gpu(results))
    document.write_text(table)
    now = libraries.csrc_hash()
    assert quoted_stale_rows([path], [document], now) == ([], [])
    sentences, findings = quoted_stale_rows([path], [document], "f" * 64)
    assert len(sentences) == 1 and "Made Up 9000 were measured on other sources" in sentences[0]
    assert len(findings) == 5 and "README.md quotes made-up.json" in findings[0]
    document.write_text("nothing")
    assert quoted_stale_rows([path], [document], "f" * 64)[1] == []
    # Results of a CPU are not checked here: `pytest --benchmark` checks its build
    path.write_text(json.dumps(results))
    assert quoted_stale_rows([path], [document], "f" * 64) == ([], [])
