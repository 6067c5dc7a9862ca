# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks print and write, and their two front ends, on tiny sizes."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from benchmark_cases import EFFORT, READ, STEADY, TINY, case_result

from dualhead_ext import bench
from dualhead_ext.bench import (
    cases,
    contenders,
    decode,
    generation,
    loss,
    loss_cases,
    report,
    runner,
    training_cases,
)
from dualhead_ext.measurement import machine

ROOT = Path(__file__).resolve().parents[2]
TINY_LOSS = loss_cases.LossCase(24, 77, "bf16", tokens=32, pairs=2, compile=False)


def tiny_report():
    """A report of one real group, and what was printed."""
    found, printed = report.Report({**machine.describe()}), []
    operands = contenders.Operands(TINY, EFFORT.cold_bytes)
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


def test_quantised_heads_stand_beside_the_bf16_contenders():
    group = cases.Group(128, 77, "bf16", (cases.Case(1, 5, quantized=True),))
    operands = contenders.Operands(group, EFFORT.cold_bytes)
    found = report.Report({**machine.describe()})
    printed = found.add(decode.run_case(group.cases[0], operands, EFFORT), READ)
    assert all(f" {name} " in printed for name in report.QUANTIZED)
    rows = {(row["contender"], row["format"]): row for row in found.cases}
    names = [("dualhead", "bf16"), ("eager", "bf16"), ("lm_head", "bf16")]
    assert list(rows) == names + [("dualhead", name) for name in report.QUANTIZED]
    table = report.markdown(found.as_json())
    for name in report.QUANTIZED:
        ratio = rows["eager", "bf16"]["us_median"] / rows["dualhead", name]["us_median"]
        line = next(line for line in table.splitlines() if f"| {name} | 1 | 5 |" in line)
        assert f"{ratio:.2f}x" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        pytest.param(100_000 * "[", "must be JSON", id="deep"),
        ("[]", "must be a results file"),
        ("{}", "must be a results file"),
    ],
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


def test_the_command_refuses_before_it_runs(monkeypatch):
    monkeypatch.setattr(runner, "run", None)
    with pytest.raises(ValueError, match="seconds must be at least 0"):
        command_line("--seconds", "-1")
    with pytest.raises(FileNotFoundError, match="in a folder that exists"):
        command_line("--json", "no/such/folder/x.json")


@pytest.mark.slow
def test_the_command_runs_writes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "plan", lambda quick: [TINY])
    monkeypatch.setattr(cases, "growth_plan", lambda: [TINY])
    monkeypatch.setattr(loss_cases, "plan", lambda quick: [TINY_LOSS])
    monkeypatch.setattr(loss, "_required_ratio", lambda case: 0.0)
    monkeypatch.setattr(generation, "plan", lambda quick: [generation.tiny_model()])
    monkeypatch.setattr(machine, "cold_bytes", lambda device: 2**20)
    monkeypatch.setattr(decode, "required_speedup", lambda group, case: 0.01)
    path = str(tmp_path / "results.json")
    assert command_line("--seconds", "0", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "40x77-bf16" in printed
    assert "tokens/s" in printed
    results = report.load(path)
    assert len(results["cases"]) == len(results["growth"]) == 6
    assert len(results["generate"]) == 4
    assert {row["contender"] for row in results["loss"]} >= {"dualhead", "eager"}
    monkeypatch.setattr(cases, "plan", None)  # from here on, nothing may run
    assert command_line("--report", path) == 0
    printed = capsys.readouterr().out
    assert "random Llama" in printed and "| 24 x 77 | bf16 | 32 |" in printed


def test_the_command_runs_one_part(tmp_path, monkeypatch, capsys):
    for module in (cases, loss_cases, generation):
        monkeypatch.setattr(module, "plan", None)
    monkeypatch.setattr(training_cases, "plan", lambda quick: [training_cases.tiny_case()])
    path = str(tmp_path / "results.json")
    assert command_line("--part", "training", "--seconds", "0", "--json", path) == 0
    assert "times forward's time" in capsys.readouterr().out
    results = report.load(path)
    assert [row["contender"] for row in results["training"]] == [
        *("forward", "dualhead", "eager", "cached")
    ]
    assert "| random Llama, 0.2M | bf16 | cached |" in report.markdown(results)


def test_the_command_fails_where_the_step_is_too_slow(monkeypatch, capsys):
    monkeypatch.setattr(cases, "plan", lambda quick: [TINY])
    monkeypatch.setattr(cases, "growth_plan", lambda: [])
    monkeypatch.setattr(loss_cases, "plan", lambda quick: [])
    monkeypatch.setattr(generation, "plan", lambda quick: [])
    monkeypatch.setattr(machine, "cold_bytes", lambda device: 2**20)
    monkeypatch.setattr(decode, "required_speedup", lambda group, case: 1e9)
    assert command_line("--seconds", "0") == 1
    assert capsys.readouterr().out.count("\ntoo slow: ") == 2


TINY_SESSION = """
    import sys
    sys.path.insert(0, {build!r})
    import libraries, pytest
    from dualhead_ext.bench import cases, decode, generation, loss_cases
    from dualhead_ext.measurement import machine
    tiny = (cases.Case(2, 9), cases.Case(1, 5, sampled=True))
    cases.plan = lambda quick: [cases.Group(40, 77, name, tiny) for name in ("fp32", "bf16")]
    cases.growth_plan = lambda: [cases.Group(40, 77, "bf16", tiny[:1])]
    decode.required_speedup = lambda group, case: {required}[group.format]
    generation.plan = lambda quick: [generation.tiny_model()]
    loss_cases.plan = lambda quick: []
    machine.cold_bytes = lambda device: 2**20
    real = machine.describe()
    machine.describe = lambda device: real | dict(csrc_sha256={csrc_hash})
    sys.exit(pytest.main(["--benchmark", "--benchmark-seconds", "0", *sys.argv[1:]]))
"""


def pytest_session(*arguments, required, csrc_hash="libraries.csrc_hash()"):
    """``pytest --benchmark`` from the root, on tiny groups."""
    source = textwrap.dedent(TINY_SESSION).format(
        build=str(ROOT / "_build"), required=required, csrc_hash=csrc_hash
    )
    # -k: if collection ever goes wrong, pytest must not run this file from within itself.
    arguments = (
        "-p",
        "no:cacheprovider",
        "-k",
        "test_decode_step or test_growth or test_loss or test_generate",
        *arguments,
    )
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_pytest_benchmark_from_the_root(tmp_path):
    """One group is fast enough and one is not. Both are printed and written."""
    path = tmp_path / "results.json"
    done = pytest_session(f"--results-json={path}", required={"fp32": 0.01, "bf16": 1e9})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 3 passed" in done.stdout
    assert "_ test_decode_step[40x77-bf16] _" in done.stdout
    assert "deselected" not in done.stdout, "tests were collected beside the benchmarks"
    assert "Captured log" not in done.stdout, "the failure drowns in torch's log"
    for text in ("40x77-fp32: ", "40x77-bf16: ", "dualhead", "eager", "lm_head", "tokens/s"):
        assert text in done.stdout
    results = report.load(path)
    assert len(results["cases"]) == 12
    assert len(results["growth"]) == 3
    assert len(results["generate"]) == 4
    assert len(results["failures"]) == 2


@pytest.mark.slow
def test_a_stale_build_is_not_timed():
    done = pytest_session(required={"fp32": 0.01, "bf16": 0.01}, csrc_hash="'0' * 64")
    assert done.returncode == 1
    assert "csrc/ has changed since it was compiled" in done.stdout
    assert "4 errors" in done.stdout
    assert "quartiles" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark-seconds=0"], "--benchmark-seconds needs --benchmark"),
        (["--benchmark", "--results-json=no/such/x.json"], "in a folder that exists"),
    ],
)
def test_options_of_pytest(arguments, message):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "benchmarks"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


@pytest.mark.parametrize(
    ("document", "head", "file", "least"),
    [
        ("README.md", "| d x V |", "cpu-amd-avx512bf16.json", 5),
        ("docs/performance.md", "| d x V |", "cpu-amd-avx512bf16.json", 14),
        ("docs/performance.md", "| loss, d x V |", "cpu-loss.json", 6),
        ("docs/quantization.md", "| d x V |", "cpu-growth.json", 8),
    ],
)
def test_the_documents_tables_are_of_the_committed_results(document, head, file, least):
    """Each row of a quoted table is in a committed results file."""
    lines = (ROOT / document).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    results = report.load(ROOT / "benchmarks" / "results" / file)
    assert not results["quick"] and not results["failures"]
    assert len(rows) >= least
    assert set(rows) <= set(report.markdown(results).splitlines())


def test_the_comparisons_shown_are_those_of_the_committed_run():
    """The documents show every table of the run, row by row, and its plots, and no other system."""
    run = ROOT / "benchmarks" / "results" / "paper" / "small"
    text, tables = (ROOT / "docs" / "results.md").read_text(), (run / "tables.md").read_text()
    text = text[text.index("## The paper's comparisons, run") :]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [line for line in tables.splitlines() if line.startswith("|")]
    assert "not run" not in tables
    cells = json.loads((run / "results.json").read_text())["cells"]
    assert f"{len(cells)} of {len(cells)} cells" in tables
    assert all(cell["environment"].keys() >= {"device", "commit", "torch"} for cell in cells)
    for plot in run.glob("*.png"):
        assert f"(../benchmarks/results/paper/small/{plot.name})" in text
