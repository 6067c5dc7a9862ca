# SPDX-License-Identifier: Apache-2.0
"""The benchmark of reward heads that are corrections, on tiny sizes.

The tests cover what its contenders compute, which goals it reports as met and missed, and its
tables.
"""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_cases import STEADY

from dualhead_ext import bench, ops
from dualhead_ext.bench import (
    comparisons,
    correction_files,
    correction_losses,
    correction_models,
    correction_steps,
    loss_cases,
    models,
    report,
    runner,
    tables,
)
from dualhead_ext.bench.correction_steps import RANKS
from dualhead_ext.loss import chunked
from dualhead_ext.measurement.timing import Timing

TINY = correction_steps.StepCase(128, 200, "bf16", 2, "logits", 9)
TINY_LOSS = loss_cases.LossCase(24, 77, "fp32", tokens=32, pairs=2, compile=False)


def timing(name, factor):
    return Timing(name, tuple(factor * us for us in STEADY))


# --- comparisons ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "low", "goal", "outcome"),
    [
        (1.03, 1.02, 1.04, "reached"),
        (1.05, 1.03, 1.04, "within the spread"),
        (1.05, 1.05, 1.04, "missed"),
        (9.0, 9.0, None, ""),
    ],
)
def test_goals_that_are_met(value, low, goal, outcome):
    found = comparisons.Comparison("time", "plain", value, low, 2 * value, goal)
    assert found.outcome == outcome == found.as_row()["outcome"]
    contest = comparisons.Contest("step", {"B": 1}, {"lowrank": {}}, {"lowrank": [found]})
    assert len(contest.failures()) == (outcome == "missed")
    assert contest.rows()[0]["comparisons"][0]["goal"] == goal


def test_a_ratio_is_of_the_same_rounds():
    found = comparisons.Comparison.of_times(timing("a", 3.0), timing("b", 2.0), 1.4)
    assert found.over == "b" and found.value == found.low == found.high == pytest.approx(1.5)
    assert found.outcome == "missed"


# --- the decode step ------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("format_name", ["fp32", "bf16"])
def test_a_step_times_all_contenders(format_name, mix):
    case = correction_steps.StepCase(128, 200, format_name, 2, mix, 9)
    contest = correction_steps.run_case(case, seconds=0, cold_bytes=400_000, min_rounds=3)
    names = {"full", "embedding", "lowrank", "plain", "lm_head"}
    int8 = {"embedding int8", "lowrank int8", "plain int8"} if format_name == "bf16" else set()
    assert set(contest.figures) == names | int8
    rows = json.loads(json.dumps(contest.rows()))
    assert rows == contest.rows()
    for row in rows:
        assert (row["d"], row["B"], row["mix"], row["repeats"]) == (128, 2, mix, 3)
        over = {found["over"] for found in row["comparisons"]}
        own = {"plain int8" if "int8" in row["contender"] else "plain", "lm_head"}
        assert over == (own - {row["contender"]} if row["contender"] != "lm_head" else set())
    assert not contest.failures()  # a tiny case has no goals


def test_every_contender_reads_cold_copies(monkeypatch):
    """Each call gets the next of the contender's own copies, and every step finds T - 1 columns."""
    seen = {}

    def spy(**arguments):
        key = arguments.get("reward_head", "full"), arguments["lm_weight"].dtype
        seen.setdefault((*key, "cache_k" in arguments), []).append(
            arguments["lm_weight"].data_ptr()
        )
        if "cache_length" in arguments:
            assert arguments["cache_length"].tolist() == [8, 8]
        return step(**arguments)

    step = ops.decode_step
    monkeypatch.setattr(correction_steps.ops, "decode_step", spy)
    steps = correction_steps.Steps(TINY, 400_000)
    contenders = steps.contenders()
    seen.clear()
    for copy in (*range(steps.count), 0):
        for contender in contenders:
            contender.prepare(copy)
            contender.call(copy)
    assert len(seen) == 7 and steps.count > 1
    for (_, dtype, _), addresses in seen.items():
        distinct = len(set(addresses))
        assert distinct == (len(addresses) if dtype == torch.int8 else steps.count)


@pytest.mark.parametrize("name", ["full", "embedding", "lowrank", "plain", "lowrank int8"])
def test_a_wrong_step_is_not_timed(name, monkeypatch):
    steps = correction_steps.Steps(TINY, 1)
    wanted = steps.arguments[name][0]

    def wrong(**arguments):
        out = step(**arguments)
        return out._replace(logits=out.logits + (arguments.keys() == wanted.keys()))

    step = ops.decode_step
    monkeypatch.setattr(correction_steps.ops, "decode_step", wrong)
    with pytest.raises(RuntimeError, match=r"and eager differ by .* in logits"):
        correction_steps.run_case(TINY, seconds=0, cold_bytes=1, min_rounds=2)


def test_the_plain_step_is_the_lm_head_alone():
    steps = correction_steps.Steps(TINY, 1)
    with torch.no_grad():
        out = ops.decode_step(**steps.arguments["plain"][0])
        row = steps.rows[0]
    assert out.alpha.tolist() == [0.0, 0.0]
    expected = row["hidden"].float() @ row["lm_weight"].float().T
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)


def test_the_goals_are_those_of_one_request(monkeypatch):
    """The goals hold for d = 4096, V = 32000, B = 1 and the logits mix. The times are made up."""
    factors = {"plain": 1.0, "full": 2.0, "embedding": 1.05, "lowrank": 1.05, "lm_head": 1.2}
    factors |= {"plain int8": 0.5, "embedding int8": 0.7, "lowrank int8": 0.8}

    class NoSteps:
        count = 1

        def __init__(self, case, cold_bytes):
            pass

        def contenders(self):
            return []

    made = {name: timing(name, factor) for name, factor in factors.items()}
    monkeypatch.setattr(correction_steps, "Steps", NoSteps)
    monkeypatch.setattr(correction_steps, "alternate", lambda *_, **__: made)
    for case in correction_steps.plan():
        contest = correction_steps.run_case(case, seconds=0, cold_bytes=1)
        missed = [text.split(": ")[1] for text in contest.failures()]
        goals = [f for row in contest.rows() for f in row["comparisons"] if f["goal"] is not None]
        if case.B == 1 and case.mix == "logits":
            assert missed == ["embedding", "lowrank int8"] and len(goals) == 6
        else:
            assert not missed and not goals
    asked = [(case.d, case.V, case.format, case.B, case.mix) for case in correction_steps.plan()]
    assert asked == [
        (4096, 32000, name, B, mix)
        for name in ("fp32", "bf16")
        for B in (1, 8)
        for mix in ("logits", "probs")
    ]


# --- the training loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_losses_are_timed(name):
    case = loss_cases.LossCase(24, 77, name, tokens=32, pairs=2, compile=False)
    contest = correction_losses.run_case(case, seconds=0, min_rounds=2)
    corrections = [f"{kind}{terms}" for kind in RANKS for terms in ("", ", LM", ", KL")]
    assert list(contest.figures) == ["full", *corrections]
    assert all(row["extra_bytes"] > 0 for row in contest.figures.values())
    assert [row.get("rank") for row in contest.rows()] == [None, *[16] * 3, *[64] * 3]
    compared = [(f.what, f.over) for f in contest.comparisons["lowrank, KL"]]
    assert compared == [("time", "full"), ("memory", "full")]


@pytest.mark.parametrize("what", ["loss", "reward_up", "gate_logit"])
def test_a_wrong_loss_is_not_timed(what, monkeypatch):
    right = chunked.dual_head_loss

    def wrong(hidden, labels, mask, gate_logit, heads, *rest):
        if heads.reward_head == "full":
            return right(hidden, labels, mask, gate_logit, heads, *rest)
        if what == "gate_logit":
            gate_logit = gate_logit * 0.5 + gate_logit.detach() * 0.5
        elif what != "loss":
            half = 0.5 * getattr(heads, what)
            heads = chunked.replace(heads, **{what: half + half.detach()})
        out = right(hidden, labels, mask, gate_logit, heads, *rest)
        out.loss = out.loss * (1.01 if what == "loss" else 1.0)
        return out

    monkeypatch.setattr(chunked, "dual_head_loss", wrong)
    with pytest.raises(RuntimeError, match=f"embedding and the reference's loss .* in {what}"):
        correction_losses.run_case(TINY_LOSS, seconds=0, min_rounds=2)


def test_the_goals_of_the_loss_are_for_token_rewards_alone(monkeypatch):
    case = correction_losses.plan()[0]
    assert (case.d, case.V, case.tokens) == (1024, 32000, 2048)
    factors = {"full": 1.0, "embedding": 0.04, "lowrank": 0.06}
    factors |= {f"{kind}, {term}": 2.0 for kind in RANKS for term in ("LM", "KL")}
    made = {name: timing(name, factor) for name, factor in factors.items()}
    batch = correction_losses.Batch(TINY_LOSS)
    monkeypatch.setattr(correction_losses, "Batch", lambda case: batch)
    monkeypatch.setattr(correction_losses.CorrectionLoss, "check", lambda self, name: None)
    monkeypatch.setattr(correction_losses, "alternate", lambda *_, **__: made)
    sizes = {"full": 100, "embedding": 9, "lowrank": 11}
    monkeypatch.setattr(correction_losses, "peak_bytes", lambda c: 10**9 * sizes.get(c.name, 300))
    failures = correction_losses.run_case(case, seconds=0).failures()
    assert [text.split(": ")[1] for text in failures] == ["lowrank", "lowrank"]
    assert "of the time of full" in failures[0] and "of the memory of full" in failures[1]


# --- whole models, files --------------------------------------------------------------------------


@pytest.mark.slow
def test_models_are_timed_with_heads_at_work():
    (case,) = correction_models.plan(quick=True)
    (contest,) = correction_models.run_case(case, seconds=0)
    assert list(contest.figures) == ["plain", "default", "full", "full int8"]
    assert not contest.failures()
    row = contest.rows()[1]
    assert row["tokens_per_s_median"] == pytest.approx(4 / row["us_median"] * 1e6)
    assert row["reward_head"] == "embedding" and row["reward_rank"] == 0
    plain = case.llama.build().eval()
    model = correction_models.gated(plain, **correction_models.HEADS["default"])
    assert model.lm_head_module.reward_head.bias.abs().min() > 0
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, plain(ids).logits)


def test_the_plan_of_models():
    plan = correction_models.plan()
    shapes = {case.name: case.llama for case in plan}
    assert shapes["135M-shaped"].build("meta").num_parameters() == 134515008
    config = shapes["135M-shaped"].build("meta").config
    assert config.num_key_value_heads == 3 and config.tie_word_embeddings
    assert shapes["1B-shaped"] == models.LLAMA_1B
    for case in plan:
        assert [batch for batch, _ in case.batches] == [1, 8, 32]
        assert case.judged
        for speeds in correction_models.SPEEDS.values():
            assert list(speeds) == [batch for batch, _ in case.batches]
    assert {(c.name, c.format) for c in plan} >= {("135M-shaped", "fp32"), ("135M-shaped", "bf16")}


def test_files_are_counted_as_saved(monkeypatch):
    contest = correction_files.run_case(correction_files.TINY)
    numbers = {"embedding": 16 * (64 + 64) + 64, "lowrank": 64 * (64 + 512) + 512}
    for kind, count in numbers.items():
        assert 4 * count < contest.figures[kind]["bytes"] < 4 * count + 20_000
    monkeypatch.setattr(correction_files, "SHAPE", correction_files.TINY)
    monkeypatch.setattr(correction_files, "BYTES", {"embedding": 20_000, "lowrank": 4 * 37_376})
    contest = correction_files.run_case(correction_files.TINY)
    assert [f.outcome for (f,) in contest.comparisons.values()] == ["reached", "missed"]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_runs_the_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(correction_steps, "plan", lambda quick: [TINY])
    monkeypatch.setattr(correction_losses, "plan", lambda quick: [TINY_LOSS])
    path = tmp_path / "results.json"
    found = runner.run(True, 0.0, print, ["corrections"], path=str(path))
    printed = capsys.readouterr().out
    assert "step, d = 128, V = 200, bf16, B = 2, T = 9, logits" in printed
    results = report.load(path)  # written after each case
    assert results["corrections"] == json.loads(json.dumps(found.corrections))
    assert {row["measure"] for row in results["corrections"]} == {"file", "step", "loss", "model"}
    assert found.add_contest(comparisons.Contest("step", {}, {}, {})) and not found.failures
    table = report.markdown(results)
    assert table.startswith("| measured | contender | takes | over | goal |")
    assert "| step, d = 128, V = 200, bf16, B = 2, T = 9, logits | lowrank int8 r = 64 |" in table
    with pytest.raises(ValueError, match="part corrections: measured on the CPU alone"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        bench.check_options(None, None, "cuda", ["corrections"])


def test_a_row_shows_its_goal():
    found = [
        comparisons.Comparison("time", "plain", 1.05, 1.045, 1.06, 1.04),
        comparisons.Comparison.exact("memory", "full", 0.08, 0.1),
    ]
    contest = comparisons.Contest("step", {"B": 1}, {"x": {"us_median": 5e3}}, {"x": found})
    row = tables.correction_lines(contest.rows())[2]
    over = "plain: 1.050 (1.045..1.060); full, memory: 0.080"
    assert row == f"| step, B = 1 | x | 5.000 ms | {over} | 1.04: missed; 0.1: reached |"
