# SPDX-License-Identifier: Apache-2.0
"""The loss's benchmark: contenders agree, the memory figure is right, wrong results are errors."""

from __future__ import annotations

import json

import pytest
import torch
from benchmark_cases import STEADY

from dualhead_ext.bench import loss, loss_cases, loss_contenders, memory, report, tables
from dualhead_ext.loss import chunked as fused_loss
from dualhead_ext.measurement.timing import Contender, Timing

TINY = {"d": 24, "V": 77, "format": "fp32", "tokens": 32, "pairs": 2, "compile": False}
# The variants of gpu_variants(), at small sizes: name -> fields.
VARIANTS = {
    "six products": {"pairs": 0, "sequences": 4, "gradients": ("reward", "lm", "hidden")},
    "four products": {"pairs": 0, "sequences": 4, "gradients": ("reward", "lm")},
    "one pair": {"pairs": 1},
    "packed": {"packed": True},
    "two objectives": {"objectives": 2},
}


def tiny(**fields) -> loss_cases.LossCase:
    return loss_cases.LossCase(**TINY | fields)


@pytest.mark.parametrize(
    "name, compiled",
    [("fp32", False), ("bf16", False), pytest.param("fp32", True, marks=pytest.mark.slow)],
)
def test_a_case_runs(name, compiled):
    case = tiny(format=name, compile=compiled)
    result = loss.run_case(case, seconds=0, min_rounds=2)
    rows = {row["contender"]: row for row in result.rows()}
    chunked = hasattr(torch.nn.functional, "linear_cross_entropy")
    expected = {"dualhead", "eager"} | ({"compile"} if case.compile else set())
    assert set(rows) == expected | ({"torch_chunked"} if chunked else set())
    assert all(row["us_median"] > 0 and row["repeats"] >= 2 for row in rows.values())
    assert f"loss, 24x77-{name}, 32 tokens" in result.text()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_runs(variant, name, monkeypatch):
    """All contenders agree, including gradients.

    Here too, one pair is longer than the workspace.
    """
    monkeypatch.setattr(fused_loss, "WORKSPACE_BYTES", 20 * 77 * 4)
    case = tiny(format=name, **VARIANTS[variant])
    rows = loss.run_case(case, seconds=0, min_rounds=2).rows()
    assert {row["contender"] for row in rows} >= {"dualhead", "eager"}
    assert all(row["extra_bytes"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    settings = {(r["pairs"], *r["gradients"], r["objectives"], r["packed"]) for r in rows}
    assert len(settings) == 1


def test_the_plan_of_a_gpu_holds_the_variants_tested_here():
    """The plan has its own sizes. One of its pairs is longer than the loss's workspace."""

    def kind(case):
        one = case.pairs == 1
        return one, bool(case.sequences), case.gradients, case.objectives, case.packed

    tested = [kind(tiny(**fields)) for fields in VARIANTS.values()]
    for quick in (False, True):
        assert [kind(case) for case in loss_cases.gpu_variants(quick)] == tested
    plan = loss_cases.gpu_plan() + loss_cases.gpu_variants()
    assert {(case.d, case.tokens, case.format) for case in plan} == {(4096, 8192, "bf16")}
    assert {case.V for case in plan} == {32000, 128256} and all(case.compile for case in plan)
    one = next(case for case in plan if case.pairs == 1)
    assert 3 * max(one.lengths()) * one.V * 4 > fused_loss.WORKSPACE_BYTES


def test_packed_rows_hold_half_of_the_tokens_each():
    case = tiny(tokens=240, pairs=6, packed=True)
    lengths = case.lengths()
    assert sum(lengths) == 240 and sum(lengths[:6]) == 120 and lengths[:6] == lengths[:5:-1]
    assert min(lengths) < 0.7 * 20 and max(lengths) > 1.3 * 20
    batch = loss_contenders.Batch(case)
    assert batch.hidden.shape == (1, 240, 24) and batch.mask.sum(-1).tolist() == lengths
    # In row-major order, the tokens of the rows are the packed tokens.
    assert torch.equal(batch.in_rows(batch.hidden)[batch.mask], batch.hidden[0])


def test_pairs_take_turns_with_the_objectives():
    batch = loss_contenders.Batch(tiny(tokens=48, pairs=3, objectives=2))
    assert batch.objective.tolist() == [0, 1, 0] and batch.reward_weight.shape[0] == 2
    assert not torch.equal(*batch.reward_weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequences": 4}, "of pairs or of sequences"),
        ({"pairs": 0}, "of pairs or of sequences"),
        ({"tokens": 33}, "must fill 4 rows"),
        ({"gradients": ("reward", "lm_head")}, r"got \['lm_head'\]"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


@pytest.mark.parametrize("what", ["loss", "gate_logit", "reward_weight", "lm_weight", "hidden"])
def test_contenders_that_disagree_are_an_error(what, monkeypatch):
    """They may disagree in the loss or in any one of the gradients."""
    right = fused_loss.dual_head_loss

    def wrong(hidden, labels, mask, gate_logit, heads, *rest):
        if what == "hidden":
            hidden = hidden * 0.5 + hidden.detach() * 0.5
        elif what == "gate_logit":
            gate_logit = gate_logit * 0.5 + gate_logit.detach() * 0.5
        elif what != "loss":
            weight = getattr(heads, what)
            setattr(heads, what, weight * 0.5 + weight.detach() * 0.5)
        out = right(hidden, labels, mask, gate_logit, heads, *rest)
        out.loss = out.loss * (1.01 if what == "loss" else 1.0)
        return out

    monkeypatch.setattr(fused_loss, "dual_head_loss", wrong)
    case = tiny(gradients=loss_cases.GRADIENTS)
    with pytest.raises(RuntimeError, match=f"dualhead and eager's loss differ by .* in {what}"):
        loss.run_case(case, seconds=0, min_rounds=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_language_model_term_is_an_error(variant, monkeypatch):
    """A contender that computes only that term is compared with eager's, in bf16 too."""

    def wrong(hidden, weight, labels):
        return 1.5 * torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    case = tiny(format="bf16", **VARIANTS[variant])
    calls = {"torch_chunked": None}

    def language_model_calls(batch):
        calls["torch_chunked"] = lambda: batch.language_model_term(wrong)
        return calls

    monkeypatch.setattr(loss, "language_model_calls", language_model_calls)
    with pytest.raises(
        RuntimeError, match=r"torch_chunked and eager's loss differ by 0\.5 in loss"
    ):
        loss.run_case(case, seconds=0, min_rounds=2)


def test_memory_is_counted_beyond_every_gradient(monkeypatch):
    """The memory figure leaves out the gradients.

    They are those of W_RM and the gate in fp32, of a trained W_LM in fp32, and of hidden states in
    their own dtype.
    """
    monkeypatch.setattr(loss, "peak_of", lambda device: lambda contender: 10**6)
    case = tiny(format="bf16", **VARIANTS["six products"])
    found = loss.run_case(case, seconds=0, min_rounds=2).extra_bytes["dualhead"]
    assert found == 10**6 - (32 * 4 + 2 * 77 * 24 * 4 + 32 * 24 * 2)
    found = loss.run_case(tiny(format="bf16"), seconds=0, min_rounds=2).extra_bytes["dualhead"]
    assert found == 10**6 - (32 * 4 + 77 * 24 * 4)


def test_peak_bytes_are_those_in_use_at_once():
    def call(copy):
        kept = torch.empty(1_000_000, dtype=torch.uint8)
        for _ in range(3):
            torch.empty(500_000, dtype=torch.uint8)
        return kept

    peak = memory.peak_bytes(Contender("some", call))
    assert 1_500_000 <= peak < 1_600_000


@pytest.mark.parametrize(
    ("factor", "memory", "words"),
    [(1.3, 0.1, []), (1.2, 0.1, ["times as long"]), (1.3, 0.2, ["20% of the memory"])],
)
def test_goals_that_are_missed(factor, memory, words):
    timings = {
        "dualhead": Timing("dualhead", tuple(STEADY)),
        "eager": Timing("eager", tuple(factor * us for us in STEADY)),
    }
    case = loss_cases.LossCase(1024, 32000, "fp32")
    extra = {"dualhead": int(memory * 1e9), "eager": 10**9}
    failures = loss.LossResult(case, timings, extra).failures()
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))


@pytest.mark.parametrize("variant", ["", *VARIANTS])
def test_liger_takes_the_language_model_term(variant, monkeypatch):
    """Liger, where it is installed, is called as its documentation says, over [(1 - a) h; a h]."""
    batch = loss_contenders.Batch(tiny(**VARIANTS.get(variant, {})))
    seen = []

    def stand_in(hidden, weight, labels, reduction):
        seen.append((hidden.shape, weight.shape, labels.shape))
        logits = hidden @ weight.T
        return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)

    monkeypatch.setattr(loss_contenders, "liger", stand_in)
    assert "liger" not in loss_contenders.language_model_calls(batch)  # it has no CPU kernel
    monkeypatch.setattr(batch, "device_type", "cuda")
    liger = loss_contenders.language_model_calls(batch)["liger"]
    batch.device_type = "cpu"
    got = batch.gradients(liger)
    tokens = 32 if "products" in variant else 16
    assert seen == [((tokens, 48), (77, 48), (tokens,))]
    expected = batch.gradients(lambda: loss_contenders.eager_language_model_term(batch))
    torch.testing.assert_close(got, expected)


def test_a_report_of_the_loss_alone():
    """Liger's column is shown. Without rows there is no table, and without a measurement no
    bandwidth.
    """
    case = tiny()
    timings = {name: Timing(name, tuple(STEADY)) for name in ("dualhead", "eager", "liger")}
    extra = dict.fromkeys(timings, 10**6)
    found = report.Report({"device": "Made Up"})
    found.add_loss(loss.LossResult(case, timings, extra))
    lines = report.markdown(found.as_json()).splitlines()
    assert lines[0] == "| loss, d x V | weights | tokens | dualhead | eager | Liger, LM term only |"
    assert lines[2].startswith("| 24 x 77 | fp32 | 32 | ") and lines[2].count("1.00x") == 2
    assert "GB/s" not in lines[-1] and "weights cold" not in lines[-1]


def made_up(case, factor):
    """Rows of a case in which dualhead takes 10 us, and eager ``factor`` times as long."""
    timings = {n: Timing(n, (us,) * 9) for n, us in (("dualhead", 10.0), ("eager", 10.0 * factor))}
    return loss.LossResult(case, timings, dict.fromkeys(timings, 10**6)).rows()


def test_cases_are_told_apart_in_tables():
    """Files from before there was more than one setting are still read."""
    rows = made_up(tiny(), 2)
    for name in ("pairs", "gradients", "objectives", "packed"):
        for row in rows:
            del row[name]
    for factor, fields in enumerate(VARIANTS.values(), 3):
        rows += made_up(tiny(**fields), factor)
    cells = [line.split(" | ") for line in tables.loss_lines(rows)[2:]]
    assert [(cell[2], cell[4].strip(" |")[-5:]) for cell in cells] == [
        ("32", "2.00x"),
        ("32, in the LM term alone, gradients of W_RM W_LM h", "3.00x"),
        ("32, in the LM term alone, gradients of W_RM W_LM", "4.00x"),
        ("32, one pair", "5.00x"),
        ("32, packed", "6.00x"),
        ("32, K = 2", "7.00x"),
    ]
