# SPDX-License-Identifier: Apache-2.0
"""The CPU's step on the products of GEMMs, which fp32 heads take at the portable level from
GEMM_BATCH requests on: against float64, and the same run after run.
"""

from __future__ import annotations

import pytest
import torch
from decode_cases import (
    GEMM_BATCH,
    STATE,
    assert_same_bits,
    bits,
    forced_isa,
    in_double,
    make_case,
    rows,
    run,
)

from dualhead_ext import ops, reference

HEADS = [("full", 0), ("embedding", 0), ("embedding", 5), ("lowrank", 0), ("lowrank", 70)]
B = GEMM_BATCH + 1


@pytest.fixture(autouse=True)
def portable():
    with forced_isa("portable"):
        yield


def case_of(head, seed, **options):
    kind = {"reward_head": head[0], "r": head[1]}
    fixed = {"S": 20, "sample": True, "controls": True, "objective_weights": True}
    return make_case(seed, B, 131, 150, 2, **(fixed | kind | options))


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head[0]}-{head[1]}")
@pytest.mark.parametrize("mix_probs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(head, mix_probs, bias, seed):
    options = {"logit_scale": 0.5, "logit_softcap": 4.0} if bias else {}
    case = case_of(head, seed, mix_probs=mix_probs, bias=bias, **options)
    case["strength"][::5] = 0.0
    got, after = run(ops.decode_step, case)
    truth, state = run(reference.decode_step, in_double(case))
    for name in ("logits", "alpha", "logprob"):
        mine, exact = getattr(got, name).double(), getattr(truth, name)
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=2e-5)
    assert torch.equal(got.token, truth.token) and torch.equal(got.status, truth.status)
    assert torch.equal(after["draws"], state["draws"])


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head[0]}-{head[1]}")
def test_results_repeat_and_fewer_requests_take_the_other_path(head, seed):
    case = case_of(head, seed, bias=True)
    whole, after = run(ops.decode_step, case)
    again, state = run(ops.decode_step, case)
    assert_same_bits(again, whole)
    assert_same_bits(state, after)
    fewer = list(range(GEMM_BATCH - 1))
    one, _ = run(ops.decode_step, rows(case, [3]))
    some, written = run(ops.decode_step, rows(case, fewer))
    assert torch.equal(bits(some.logits[3]), bits(one.logits[0]))  # does not depend on the batch
    torch.testing.assert_close(whole.logits[fewer], some.logits, rtol=1e-5, atol=2e-5)
    for name in STATE:  # the gate takes no GEMM
        assert torch.equal(bits(written[name]), bits(after[name][fewer])), name


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_head_that_a_row_does_not_use_may_be_infinite(alpha, seed):
    case = case_of(("full", 0), seed, sample=False)
    clean, _ = run(ops.decode_step, case | {"alpha": torch.full((B,), alpha), "strength": None})
    broken = "reward_weight" if alpha == 0.0 else "lm_weight"
    case[broken] = torch.full_like(case[broken], torch.inf)
    got, _ = run(ops.decode_step, case | {"alpha": torch.full((B,), alpha), "strength": None})
    assert torch.equal(bits(got.logits), bits(clean.logits))
