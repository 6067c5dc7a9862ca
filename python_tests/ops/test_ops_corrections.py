# SPDX-License-Identifier: Apache-2.0
"""The CPU's step with a reward head that is a correction, for every instruction set.

It is compared with float64. The bits do not depend on the batch or on the number of threads. At
alpha 0 the correction does not matter.
"""

from __future__ import annotations

import pytest
import torch
from decode_cases import (
    STATE,
    assert_same_bits,
    bits,
    in_double,
    make_case,
    quantized,
    rows,
    run,
    takes_gemms,
    threads,
)

from dualhead_ext import ops, reference

KINDS = [("embedding", 0), ("embedding", 5), ("lowrank", 0), ("lowrank", 70)]
# B, d, V, K, options.
CASES = [
    (1, 1, 1, 1, {"S": 1}),
    (3, 31, 63, 2, {"bias": True}),
    (4, 33, 64, 1, {"bias": True, "logit_softcap": 2.5}),
    (5, 64, 65, 3, {"objective_weights": True, "logit_scale": 0.25}),
    (9, 130, 257, 1, {"gate": "logit", "controls": True, "bias": True}),
    (17, 100, 191, 4, {"bias": True, "objective_weights": True, "controls": True}),
    (65, 37, 67, 1, {"S": 130, "H": 2, "d_k": 17}),
    (2, 4100, 130, 1, {"gate": "logit", "objective_weights": True}),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def kind(request):
    return dict(zip(("reward_head", "r"), request.param, strict=True))


@pytest.fixture(params=[False, True], ids=["logits", "probs"])
def mix_probs(request):
    return request.param


def moved_hidden(case, alpha):
    maps = (case.get("reward_down"), case.get("reward_up"), case["reward_bias"])
    change = reference.correction(case["hidden"], *maps, case.get("objective_weights"))
    return reference.move_hidden(case["hidden"], change, alpha)


def test_errors_are_at_most_those_of_eager(isa, dtype, mix_probs, kind, seed):
    # Where the step changes hidden states in bf16, eager must do so too, to be comparable.
    rounds = kind["reward_head"] == "embedding" and isa in ("avx512bf16", "amx") and not mix_probs
    rounds = rounds and dtype == torch.bfloat16
    names = ("logits", "logprob")
    ours, theirs = ({name: [] for name in names} for _ in range(2))
    for i, (B, d, V, K, options) in enumerate(CASES * 2):
        case = make_case(seed + i, B, d, V, K, dtype, mix_probs=mix_probs, **kind, **options)
        # If log(1 - alpha) were near 1, only the gate's errors would show
        case["alpha"] = torch.rand(B)
        truth, _ = run(reference.decode_step, in_double(case))
        got, _ = run(ops.decode_step, case)
        eager, _ = run(reference.decode_step, case)
        if rounds:
            case["hidden"], case["strength"] = moved_hidden(case, truth.alpha), torch.zeros(B)
            eager = eager._replace(logits=run(reference.decode_step, case)[0].logits)
        assert got.status.eq(0).all() and torch.equal(got.token, got.logits.argmax(-1))
        same = (got.token == truth.token) & (eager.token == truth.token)
        for name in names:
            exact = getattr(truth, name)
            keep = same if name == "logprob" else slice(None)
            scale = exact.abs().max().clamp(min=1.0)
            for errors, out in ((ours, got), (theirs, eager)):
                errors[name].append(((getattr(out, name) - exact) / scale)[keep].flatten())
    for name in names:
        mine, other = torch.cat(ours[name]).abs(), torch.cat(theirs[name]).abs()
        factor = 1.1 if dtype == torch.bfloat16 or isa.startswith("avx512") else 2.0
        rms, eager_rms = mine.square().mean().sqrt(), other.square().mean().sqrt()
        assert rms <= factor * eager_rms, (name, rms, eager_rms)


@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
def test_a_row_depends_neither_on_its_batch_nor_on_threads(
    isa, dtype, mix_probs, kind, format, seed
):
    d = 256 if format == "int4" else 131
    B = 31 if takes_gemms(isa, dtype, 37) and format is None else 37
    case = make_case(
        seed, B, d, 150, 2, dtype, S=80, sample=True, controls=True, bias=True,
        objective_weights=True, mix_probs=mix_probs, record_attention=True, **kind,
    )  # fmt: skip
    case["strength"][::5] = 0.0
    if format:
        case = quantized(case, format)
    whole, after = run(ops.decode_step, case)
    with threads(3):
        assert_same_bits(run(ops.decode_step, case)[0], whole, "threads")
    for chosen in ([0], [B - 1], [5, 10], [3, 4], [7, 1, 30], list(range(20, B))):
        got, state = run(ops.decode_step, rows(case, chosen))
        assert_same_bits(got, type(whole)(*(x[chosen] for x in whole)), f"rows {chosen}")
        for name in STATE:
            assert torch.equal(bits(state[name]), bits(after[name][chosen])), name


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_a_quantised_lm_head_is_what_its_numbers_mean(isa, dtype, mix_probs, kind, format, seed):
    options = {"objective_weights": True, "gate": "logit", "bias": True}
    case = make_case(seed, 3, 384, 131, 2, dtype, mix_probs=mix_probs, **options, **kind)
    case = quantized(case, format)
    got, _ = run(ops.decode_step, case)
    truth, _ = run(reference.decode_step, in_double(case))
    # An embedding head's changed hidden state is rounded to its dtype once more.
    error = (got.logits - truth.logits).square().mean().sqrt()
    rounding = 2.0**-8 if dtype == torch.bfloat16 and kind["reward_head"] == "embedding" else 1e-5
    assert error <= rounding * truth.logits.abs().max()


def test_alpha_0_is_the_plain_lm_head_whatever_the_correction_is(isa, dtype, mix_probs, kind, seed):
    """Bit for bit, alone and beside a row with alpha above 0."""
    case = make_case(seed, 4, 40, 90, 1, dtype, gate="logit", mix_probs=mix_probs, **kind)
    full = make_case(seed, 4, 40, 90, 1, dtype, gate="logit", mix_probs=mix_probs)
    plain, _ = run(ops.decode_step, full | {"strength": torch.zeros(4)})
    case |= {name: full[name] for name in ("hidden", "lm_weight")}
    for name in ("reward_down", "reward_up", "reward_bias"):
        if name in case:
            case[name] = torch.full_like(case[name], torch.nan)
    for strengths in ([0.0] * 4, [0.0, 1.0, 0.0, 2.0]):
        got, _ = run(ops.decode_step, case | {"strength": torch.tensor(strengths)})
        for b, strength in enumerate(strengths):
            if strength == 0.0:
                assert torch.equal(bits(got.logits[b]), bits(plain.logits[b]))
                assert got.status[b] == 0 and got.token[b] == plain.token[b]
            else:
                assert got.status[b] == 1 and got.token[b] == 0


def test_full_and_broken_rows_stay_alone(isa, dtype, mix_probs, kind, seed):
    case = make_case(seed, 5, 65, 200, 1, dtype, sample=True, mix_probs=mix_probs, **kind)
    clean, _ = run(ops.decode_step, case)
    case["cache_length"][1] = case["cache_k"].shape[2]
    case["hidden"][3, 40] = torch.nan
    got, state = run(ops.decode_step, case)
    assert got.status.tolist() == [0, 2, 0, 1, 0]
    assert got.token[[1, 3]].eq(0).all() and got.logprob[[1, 3]].isnan().all()
    assert (state["draws"] - case["draws"]).tolist() == [1, 0, 1, 1, 1]
    for name in ("logits", "token", "logprob"):
        keep = [0, 2, 4]
        assert torch.equal(bits(getattr(got, name)[keep]), bits(getattr(clean, name)[keep])), name


def test_maps_of_any_layout(kind, seed):
    case = make_case(seed, 3, 40, 90, 2, gate="logit", **kind)
    expected, _ = run(ops.decode_step, case)
    for name in ("reward_down", "reward_up", "reward_bias"):
        if name in case:
            value = case[name]
            wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), torch.nan)
            wide[..., ::2] = value
            case[name] = wide[..., ::2]
    assert_same_bits(run(ops.decode_step, case)[0], expected)
