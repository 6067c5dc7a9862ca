# SPDX-License-Identifier: Apache-2.0
"""The loss's benchmark: its contenders agree, its memory figure, what it calls a failure."""

import pytest
import torch
from benchmark_cases import STEADY

from dualhead_ext.bench import loss, report
from dualhead_ext.bench.timing import Contender, Timing


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_case_runs(name):
    case = loss.LossCase(24, 77, name, tokens=32, pairs=2, compile=name == "fp32")
    result = loss.run_case(case, seconds=0, min_rounds=2)
    rows = {row["contender"]: row for row in result.rows()}
    chunked = hasattr(torch.nn.functional, "linear_cross_entropy")
    expected = {"dualhead", "eager"} | ({"compile"} if case.compile else set())
    assert set(rows) == expected | ({"torch_chunked"} if chunked else set())
    assert all(row["us_median"] > 0 and row["repeats"] >= 2 for row in rows.values())
    assert f"loss, 24x77-{name}, 32 tokens" in result.text()


def test_contenders_that_disagree_are_an_error(monkeypatch):
    case = loss.LossCase(24, 77, "fp32", tokens=32, pairs=2, compile=False)
    right = loss.fused_loss.dual_head_loss

    def wrong(*args):
        out = right(*args)
        out.loss = out.loss * 1.01
        return out

    monkeypatch.setattr(loss.fused_loss, "dual_head_loss", wrong)
    with pytest.raises(RuntimeError, match="dualhead and eager's loss differ"):
        loss.run_case(case, seconds=0, min_rounds=2)


def test_peak_bytes_are_those_in_use_at_once():
    def call(copy):
        kept = torch.empty(1_000_000, dtype=torch.uint8)
        for _ in range(3):
            torch.empty(500_000, dtype=torch.uint8)
        return kept

    peak = loss.peak_bytes(Contender("some", call))
    assert 1_500_000 <= peak < 1_600_000


@pytest.mark.parametrize(
    ("factor", "memory", "words"),
    [(1.3, 0.1, []), (1.2, 0.1, ["times as long"]), (1.3, 0.2, ["20% of the memory"])],
)
def test_what_is_missed(factor, memory, words):
    timings = {
        "dualhead": Timing("dualhead", tuple(STEADY)),
        "eager": Timing("eager", tuple(factor * us for us in STEADY)),
    }
    case = loss.LossCase(1024, 32000, "fp32")
    extra = {"dualhead": int(memory * 1e9), "eager": 10**9}
    failures = loss.LossResult(case, timings, extra).failures()
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))


def test_liger_takes_the_language_model_term(monkeypatch):
    """Where it is installed: the call that its documentation gives, over [(1 - a) h; a h]."""
    batch = loss._Batch(loss.LossCase(24, 77, "fp32", tokens=32, pairs=2))
    seen = []

    def stand_in(hidden, weight, labels, reduction):
        seen.append((hidden.shape, weight.shape, labels.shape))
        logits = hidden @ weight.T
        return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)

    monkeypatch.setattr(loss, "liger", stand_in)
    assert "liger" not in loss._calls(batch, compile=False)  # it has no CPU kernel
    monkeypatch.setattr(batch, "device_type", "cuda")
    got = loss._calls(batch, compile=False)["liger"]()
    assert seen == [((16, 48), (77, 48), (16,))]
    batch.device_type = "cpu"
    options = loss.LossOptions(lambda_r=0.0, lambda_g=0.0)
    monkeypatch.setattr(loss, "LossOptions", lambda: options)
    torch.testing.assert_close(got, batch.objective(loss.reference_loss.dual_head_loss))


def test_a_report_of_the_loss_alone():
    """No table without rows, no bandwidth that was not measured; Liger's column where it ran."""
    case = loss.LossCase(24, 77, "fp32", tokens=32, pairs=2)
    timings = {name: Timing(name, tuple(STEADY)) for name in ("dualhead", "eager", "liger")}
    extra = dict.fromkeys(timings, 10**6)
    found = report.Report({"device": "Made Up"})
    found.add_loss(loss.LossResult(case, timings, extra))
    lines = report.markdown(found.as_json()).splitlines()
    assert lines[0] == "| loss, d x V | weights | tokens | dualhead | eager | Liger, LM term only |"
    assert lines[2].startswith("| 24 x 77 | fp32 | 32 | ") and lines[2].count("1.00x") == 2
    assert "GB/s" not in lines[-1] and "weights cold" not in lines[-1]
