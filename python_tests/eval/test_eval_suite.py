# SPDX-License-Identifier: Apache-2.0
"""The paper's suite at its smallest scale, as a user runs it.

The tests cover every cell and every table, resuming after an interruption, and decoders that must
agree.
"""

import csv
import gzip
import http.server
import importlib.util
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli import eval_suite
from dualhead_ext.eval.paper import report
from dualhead_ext.eval.paper.cells import Store, unfolded
from dualhead_ext.eval.paper.data import HALVES, SUBSETS, TEST, TRAIN, Data
from dualhead_ext.eval.paper.plan import MAIN, Planner
from dualhead_ext.eval.paper.running import open_system
from dualhead_ext.eval.paper.scales import SCALES
from dualhead_ext.eval.paper.steps import STEPS
from dualhead_ext.eval.paper.systems import SYSTEMS
from dualhead_ext.eval.paper.table import Table

for package, extra in (("trl", "trl"), ("peft", "peft"), ("matplotlib", "plot")):
    pytest.importorskip(package, reason=f"the extra {extra} is not installed")

pytestmark = pytest.mark.slow

FEW = "backbone,dual_head"


def write_gz(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files in the real layouts, filled from the package's sample."""
    folder = tmp_path_factory.mktemp("data")
    for split, name in (("train", TRAIN), ("test", TEST)):
        rows = dh.data.load_preference_data("embedded", split)[:160]
        pairs = [
            {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
            | {"subset": SUBSETS[i % 2]}
            for i, row in enumerate(rows)
        ]
        write_gz(folder / name, pairs)
    texts = [{"text": row["chosen"]} for row in pairs]
    write_gz(folder / "hh-rlhf-text" / "dialogues.jsonl.gz", texts)
    with open(folder / "truthfulqa.csv", "w", newline="") as file:
        names = ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
        writer = csv.writer(file)
        writer.writerow([*names, "Type", "Category", "Source"])
        for word in ("tea", "rain"):
            writer.writerow([f"Is {word} wet?", "Yes", "Yes; It is", "No; Never", "a", "b", "c"])
    turns = [["Name a tree.", "Name another."], ["Count to three.", "Count on."]]
    rows = [{"question_id": i, "category": "x", "turns": each} for i, each in enumerate(turns)]
    (folder / "mt_bench_questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def command(data: Path, out: Path, *others: str) -> int:
    try:
        where = ("--out", str(out), "--data", str(data))
        return cli.main(["eval", "--suite", "paper", "--scale", "tiny", *where, *others])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A complete run."""
    out = tmp_path_factory.mktemp("suite")
    assert command(data, out) == 0
    return out


@pytest.fixture(scope="module")
def plan(data):
    return Planner(SCALES["tiny"], Data(data))()


@pytest.fixture(scope="module")
def store(done, data):
    return Store(done, STEPS, Data(data))


# --- a whole run ----------------------------------------------------------------------------------


def test_every_system_has_a_measured_row_in_every_table_that_names_it(done, plan):
    shown = (done / "tables.md").read_text()
    assert "not run" not in shown
    assert f"{len(unfolded(plan.cells()))} of {len(unfolded(plan.cells()))} cells" in shown
    labels = [line.split(" | ")[0].removeprefix("| ") for line in shown.splitlines() if "|" in line]
    for name, system in SYSTEMS.items():
        label = "best of 2" if name == "best_of_n" else system.label
        assert label in labels, name
    assert shown.count("\n### ") == len(report.TABLES)


def test_results_and_plots_are_there(done, plan):
    results = json.loads((done / report.RESULTS).read_text())
    assert len(results["cells"]) == len(unfolded(plan.cells()))
    plots = sorted(path.stem for path in done.glob("*.png"))
    pairs = ["ablations_accuracy", "ablations_reward", "alpha_histogram", "alpha_over_response"]
    assert plots == [*pairs, "frontier", "two_objectives"]
    assert (done / "tables.tex").read_text().count(r"\begin{tabular}") == len(report.TABLES)


def test_a_second_call_computes_nothing_and_shows_the_same(done, data, capsys):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in (done / "cells").iterdir()}

    before, shown = stamps(), (done / "tables.md").read_bytes()
    assert command(data, done) == 0
    assert stamps() == before and (done / "tables.md").read_bytes() == shown


def test_a_run_goes_on_from_its_results_file_alone(done, data, tmp_path, capsys):
    (tmp_path / report.RESULTS).write_bytes((done / report.RESULTS).read_bytes())
    assert command(data, tmp_path) == 0
    assert not (tmp_path / "files").exists()
    for name in (report.RESULTS, "tables.md"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()
    for text in ("{", '{"cells": 1}', '{"cells": [{"step": "train", "key": "../x"}]}'):
        (tmp_path / report.RESULTS).write_text(text)
        assert command(data, tmp_path) == 2
        assert "suite: " in capsys.readouterr().err


def test_what_was_not_run_says_so_and_is_computed_when_asked_for(done, data, store, tmp_path):
    out = tmp_path / "some"
    assert command(data, out, "--decoders", FEW) == 0
    shown = (out / "tables.md").read_text()
    row = next(line for line in shown.splitlines() if line.startswith("| GenARM (LoRA) |"))
    assert set(row.split(" | ")[1:-1]) == {"not run"}
    assert "Left out by the command" in shown
    # Cells with the same keys have the same figures, except for times.
    small = Planner(SCALES["tiny"], Data(data), names=FEW.split(","))()
    there = Store(out, STEPS, Data(data))
    for cell in unfolded(small.cells()):
        if cell.step != "cost":
            assert there.result(cell) == store.result(cell), cell.label


# --- in pieces ------------------------------------------------------------------------------------


def test_pieces_with_little_room_come_to_the_same(data, done, plan, store, tmp_path):
    """Each call adds one record and keeps hardly any file.

    Models are trained again where they are needed, and get the same weights.
    """
    some = Planner(SCALES["tiny"], Data(data), names=["backbone", "linear_gate"])()
    cells = [cell for cell in some.systems[MAIN, "linear_gate", 0].cells if cell.step != "decode"]
    some.cells = lambda: cells
    out, left, trained = Store(tmp_path, STEPS, Data(data)), cells, []
    for _ in unfolded(cells):
        outcome = eval_suite.compute(some, out, minutes=0, state_mb=0.2)
        assert out.bytes_held() <= 0.2e6
        trained += [cell.name for cell in outcome.computed if cell.step == "train"]
        left = outcome.left
    assert left == [] and len(trained) > len(set(trained))
    for cell in cells:
        assert out.result(cell) == store.result(cell), cell.label
    assert report.other_weights(cells, out) == []


def test_time_that_runs_out_has_its_own_exit_code(data, tmp_path, capsys):
    assert command(data, tmp_path, "--decoders", FEW, "--minutes", "0") == eval_suite.EXIT_LEFT
    assert "cells are left; run the same command again to continue" in capsys.readouterr().out


# --- what the systems are -------------------------------------------------------------------------


def opened(plan, store, name):
    recipe = plan.systems[MAIN, name, 0].recipe
    folders = {role: store.folder(cell) for role, cell in recipe.roles.items()}
    return open_system(recipe.decoder, folders, recipe.options, "float32")


def test_a_swept_gate_at_zero_is_the_backbone_and_at_its_own_alpha_itself(plan, store):
    backbone = store.result(plan.systems[MAIN, "backbone", 0].likelihood)
    at_zero = store.result(plan.sweep[0.0].likelihood)
    assert at_zero["perplexity"] == pytest.approx(backbone["perplexity"], rel=1e-5)
    assert at_zero["kl"][0] == pytest.approx(0.0, abs=1e-6)
    at_half = store.result(plan.sweep[0.5].likelihood)
    own = store.result(plan.systems[MAIN, "fixed_gate", 0].likelihood)
    assert at_half["perplexity"] == pytest.approx(own["perplexity"], rel=1e-5)
    assert at_half["kl"][0] > 1e-5  # training has had an effect


def test_the_merged_head_writes_what_the_fixed_gate_does(plan, store):
    both = [opened(plan, store, name) for name in ("fixed_gate", "merged")]
    inputs = dict(both[0].tokenizer(["\n\nHuman: Tea?\n\nAssistant:"], return_tensors="pt"))
    options = {"max_new_tokens": 12, "do_sample": False}
    texts = [system.decode(dict(inputs), **options) for system in both]
    assert torch.equal(*texts)
    assert sum(map(len, (both[0].models, both[1].models))) == 2


def test_exponents_that_sum_to_more_than_one_raise_the_temperature(plan, store):
    assert opened(plan, store, "genarm_lora").temperature == 2.0
    assert opened(plan, store, "dual_head").temperature == 1.0


def test_systems_differ_from_the_backbone(plan, store):
    """Each system was really trained and really decodes: its KL is above rounding errors."""
    for (_, name, _), measured in plan.systems.items():
        if name != "backbone" and measured.likelihood is not None:
            assert store.result(measured.likelihood)["kl"][0] > 1e-6, name


def test_costs_are_of_what_each_system_runs(plan, store):
    found = store.result(plan.cost)
    forwards = {name: each["rows"][0]["forwards_per_token"] for name, each in found.items()}
    assert forwards["dual_head"] == forwards["backbone"] == forwards["merged"] == 1.0
    assert forwards["genarm_lora"] == forwards["weak_to_strong"] == 2.0
    assert found["backbone"]["trained_parameters"] == 0
    assert found["genarm_lora"]["flops_per_token"] == 2 * found["backbone"]["flops_per_token"]
    plain = found["backbone"]["rows"][0]["resident_parameters"]
    # The embedding and the LM head are no longer tied
    assert found["merged"]["rows"][0]["resident_parameters"] > plain
    assert found["genarm_lora"]["rows"][0]["resident_parameters"] == 2 * plain


# --- data -----------------------------------------------------------------------------------------


def test_judge_and_guide_share_no_training_data(data):
    rows = Data(data)
    guide, judge = (rows.training_pairs(half, 1000) for half in HALVES)
    assert len(guide) + len(judge) == 160 and min(len(guide), len(judge)) > 40
    first_turns = [
        {row["prompt"].split("\n\nAssistant:")[0] for row in half} for half in (guide, judge)
    ]
    assert not first_turns[0] & first_turns[1]
    helpful = rows.training_pairs("guide", 1000, "helpful-base")
    assert {row["objective"] for row in helpful} == {0}
    assert {row["objective"] for row in guide} == {0, 1}


def test_data_is_part_of_every_key(data, tmp_path, plan):
    other = tmp_path / "other"
    for path in data.rglob("*"):
        if path.is_file():
            (other / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
            (other / path.relative_to(data)).write_bytes(path.read_bytes())
    same = Planner(SCALES["tiny"], Data(other))()
    assert [c.key for c in same.cells()] == [c.key for c in plan.cells()]
    write_gz(other / TRAIN, [{"chosen": "x", "rejected": "y", "subset": SUBSETS[0]}])
    changed = Planner(SCALES["tiny"], Data(other))()
    assert changed.systems[MAIN, "dual_head", 0].decode.key != (
        plan.systems[MAIN, "dual_head", 0].decode.key
    )
    assert changed.systems[MAIN, "backbone", 0].decode.key == (
        plan.systems[MAIN, "backbone", 0].decode.key
    )


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoders", "dual_head"], "must have the backbone among them"),
        (["--decoders", "backbone,ppo"], "systems must be some of backbone, dual_head"),
        (["--judge-url", "http://localhost"], "expected both or neither, got one"),
        (["--data", "/nonexistent"], "there is no file"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(data, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert command(data, out, *options) == 2
    err = capsys.readouterr().err
    assert err.startswith("dualhead eval: ") and message in err and err.count("\n") == 1
    assert not out.exists()


def test_a_missing_package_is_named_before_anything_runs(data, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a)
    )
    assert command(data, tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert "the systems autoregressive_reward" in shown
    assert "need the package trl, which is not installed" in shown


def test_a_decoder_that_breaks_stops_the_run(data, done, tmp_path, monkeypatch):
    """No figure is written without its run, and the backbone's figures are not used instead."""
    from dualhead_ext.eval import decoding

    def broken(*args, **options):
        raise RuntimeError("broken decoder")

    monkeypatch.setattr(decoding, "genarm", broken)
    with pytest.raises(RuntimeError, match="broken decoder"):
        command(data, tmp_path, "--decoders", "backbone,genarm_lora")
    assert not any("genarm" in path.read_text() for path in tmp_path.glob("cells/decode-*.json"))


# --- a judge behind an endpoint -------------------------------------------------------------------


class _PrefersTheLonger(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_POST(self):
        type(self).asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        first, _, rest = question.partition("[Answer 1]\n")[2].partition("\n\n[Answer 2]\n")
        second = rest.rpartition("\n\nReply with one line")[0]
        lengths = len(first), len(second)
        verdict = "tie" if lengths[0] == lengths[1] else "1" if lengths[0] > lengths[1] else "2"
        text = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


def test_win_rates_by_an_endpoint(data, done, tmp_path):
    """The judge compares the texts of the complete run."""
    out = shutil.copytree(done, tmp_path / "out")
    server = http.server.ThreadingHTTPServer(("localhost", 0), _PrefersTheLonger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://localhost:{server.server_port}/v1"
        others = ("--decoders", FEW, "--judge-url", url, "--judge-model", "longer")
        assert command(data, out, *others) == 0
    finally:
        server.shutdown()
    plan = Planner(
        SCALES["tiny"], Data(data), names=FEW.split(","), judge_url=url, judge_model="longer"
    )()
    there = Store(out, STEPS, Data(data))
    cell = plan.over_backbone[MAIN, "dual_head", 0]
    texts = [
        [len(row["text"]) for row in json.loads((there.folder(need) / "texts.json").read_text())]
        for need in (cell.needs["a"], cell.needs["b"])
    ]
    pairs = list(zip(*texts, strict=True))
    found = there.result(cell)
    assert found["wins"] == sum(a > b for a, b in pairs)
    assert found["ties"] == sum(a == b for a, b in pairs)
    assert _PrefersTheLonger.asked > 2 * len(pairs)  # both orders, several comparisons


# --- tables ---------------------------------------------------------------------------------------


def test_latex_is_escaped():
    table = Table("x", "A & B", "50 % of a_b", ("name", "n"), [["{c}~^", "\\1"]])
    text = table.latex()
    assert r"\caption{A \& B. 50 \% of a\_b}" in text
    assert r"\{c\}\textasciitilde{}\textasciicircum{} & \textbackslash{}1 \\" in text
