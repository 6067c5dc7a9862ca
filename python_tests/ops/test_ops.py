# SPDX-License-Identifier: Apache-2.0
"""The fused CPU step against the reference, for every instruction set that this machine supports.

The tests cover values, controls and NaN. A row's bits depend on nothing but the row.
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
    rows,
    run,
    takes_gemms,
    threads,
)

from dualhead_ext import ops, reference

BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64]


# B, d, V, K, options. Every feature and odd size occurs at least once with each mixture.
VALUE_CASES = [
    (1, 1, 1, 1, {"S": 1}),
    (2, 3, 5, 1, {"H": 1, "d_k": 1, "S": 2}),
    (3, 31, 63, 2, {"bias": True}),
    (4, 33, 64, 1, {"bias": True, "logit_softcap": 2.5}),
    (5, 64, 65, 3, {"objective_weights": True, "logit_scale": 0.25}),
    (7, 127, 129, 1, {"H": 8, "d_k": 48, "S": 70, "controls": True}),
    (9, 130, 257, 1, {"gate": "logit", "controls": True, "bias": True}),
    (17, 100, 191, 4, {"bias": True, "objective_weights": True, "controls": True}),
    (65, 37, 67, 1, {"S": 130, "H": 2, "d_k": 17}),
    (6, 384, 1000, 1, {"logit_scale": -1.5, "logit_softcap": 30.0, "S": 200}),
]


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_errors_are_at_most_those_of_eager(isa, dtype, mix_probs, seed):
    """Against float64 with the same inputs: root mean square and largest error, over all cases."""
    names = ("logits", "alpha", "gate_logit", "logprob", "attention")
    ours, theirs = ({name: [] for name in names} for _ in range(2))
    for i, (B, d, V, K, options) in enumerate(VALUE_CASES * 3):
        case = make_case(
            seed + i, B, d, V, K, dtype, mix_probs=mix_probs, record_attention=True, **options
        )
        truth, _ = run(reference.decode_step, in_double(case))
        got, _ = run(ops.decode_step, case)
        eager, _ = run(reference.decode_step, case)
        assert got.status.eq(0).all() and got.logits.dtype == torch.float32
        for name in names:
            exact = getattr(truth, name)
            # logprob is compared only where all three chose the same token.
            same = (got.token == truth.token) & (eager.token == truth.token)
            keep = same if name == "logprob" else slice(None)
            scale = exact.abs().max().clamp(min=1.0) if exact.numel() else 1.0
            for errors, out in ((ours, got), (theirs, eager)):
                errors[name].append(((getattr(out, name) - exact) / scale)[keep].flatten())
    for name in names:
        mine, other = torch.cat(ours[name]).abs(), torch.cat(theirs[name]).abs()
        # Eager adds up fp32 values in at least 16 lanes. Fewer lanes add longer chains.
        factor = 1.1 if dtype == torch.bfloat16 or isa.startswith(("avx512", "amx")) else 2.0
        rms, eager_rms = mine.square().mean().sqrt(), other.square().mean().sqrt()
        assert rms <= factor * eager_rms, (name, rms, eager_rms)
        assert mine.max() <= 2 * factor * other.max(), (name, mine.max(), other.max())


def test_dot_products_are_within_the_proven_bound(isa, dtype, seed):
    """|z - exact| <= gamma_n sum |w| |h|, where n counts the additions that a term passes through.

    Products of bf16 are exact in fp32, and products of fp32 are rounded once.
    """
    lanes = {"amx": 16, "avx512bf16": 16, "avx512": 16, "avx2": 8, "portable": 4}[isa]
    for d in (1, 15, 16, 17, 31, 32, 33, 100, 1023, 4097):
        case = make_case(seed + d, 5, d, 130, 1, dtype, gate="logit", alpha=torch.zeros(5))
        got, _ = run(ops.decode_step, case)
        h, w = case["hidden"].double(), case["lm_weight"].double()
        unit = 2.0**-24
        n = -(-d // lanes) + 2 + lanes.bit_length()
        if (
            isa == "amx" and dtype == torch.bfloat16
        ):  # 16 pairs in a tile, then one tile after another
            n = 16 + 2 + -(-d // 32)
        bound = n * unit / (1 - n * unit) * (h.abs() @ w.abs().T)
        assert ((got.logits - h @ w.T).abs() <= bound).all()


def test_greedy_token_is_the_exact_argmax(isa, dtype, seed):
    """Where the margin in float64 exceeds the rounding errors of fp32 sums."""
    case = make_case(seed, 300, 65, 257, 1, dtype, H=1, d_k=2, S=3)
    got, _ = run(ops.decode_step, case)
    case |= {"alpha": got.alpha}
    truth, _ = run(reference.decode_step, in_double(case))
    top = truth.logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-4
    assert clear.sum() > 290 and torch.equal(got.token[clear], truth.token[clear])


def test_ties_go_to_the_lowest_index(isa, seed):
    case = make_case(seed, 2, 8, 400, gate="logit")
    case["lm_weight"][:] = case["reward_weight"][:] = 0.0
    for best in ([0, 399], [17, 18], [63, 64, 65], [128, 300], [399]):
        bias = torch.zeros(400)
        bias[best] = 1.0
        got, _ = run(ops.decode_step, case | {"lm_bias": bias, "reward_bias": bias[None]})
        assert got.token.tolist() == [best[0]] * 2


def test_signed_zeros_tie(isa, seed):
    case = make_case(seed, 1, 8, 100, gate="logit", alpha=torch.zeros(1))
    case["lm_weight"][:] = 0.0
    bias = torch.full((100,), -1.0)
    bias[70], bias[80] = -0.0, 0.0
    got, _ = run(ops.decode_step, case | {"lm_bias": bias})
    assert got.token.item() == 70


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_a_row_depends_neither_on_its_batch_nor_on_its_place(isa, dtype, mix_probs, seed):
    case = make_case(
        seed, 64, 75, 150, 2, dtype, S=80, sample=True, controls=True, bias=True,
        objective_weights=True, mix_probs=mix_probs, record_attention=True,
    )  # fmt: skip
    case |= {"top_p": torch.rand(64), "top_k": torch.randint(0, 9, (64,), dtype=torch.int32)}
    alone = [run(ops.decode_step, rows(case, [b])) for b in range(64)]
    generator = torch.Generator().manual_seed(seed)
    for B in BATCHES:
        if takes_gemms(isa, dtype, B):
            continue
        chosen = torch.randperm(64, generator=generator)[:B].tolist()
        got, state = run(ops.decode_step, rows(case, chosen))
        expected = type(got)(*(torch.cat([alone[b][0][i] for b in chosen]) for i in range(7)))
        assert_same_bits(got, expected, f"B={B}")
        for name in STATE:
            assert torch.equal(
                bits(state[name]), bits(torch.cat([alone[b][1][name] for b in chosen]))
            )


@pytest.mark.parametrize("d", [1024, 2100, 4096, 9000])
def test_a_row_depends_not_on_its_batch_when_rows_are_long(isa, dtype, d, seed):
    """Depending on d and B, a sum is computed in several passes, row by row or in tiles."""
    case = make_case(seed, 11, d, 70, 2, dtype, S=9, sample=True)
    whole, _ = run(ops.decode_step, case)
    for chosen in ([0], [10], [3, 4], [5, 6, 7], [0, 1, 2, 8, 9]):
        got, _ = run(ops.decode_step, rows(case, chosen))
        expected = type(got)(*(x[chosen] if x.numel() else x for x in whole))
        assert_same_bits(got, expected, f"rows {chosen}")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_stay_alone(isa, dtype, seed, poison):
    """NaN or infinite hidden states give status 1 and token 0. Every other row keeps its bits."""
    for B in (2, 7, 16):
        case = make_case(seed + B, B, 65, 200, 1, dtype, sample=True, record_attention=True)
        clean, _ = run(ops.decode_step, case)
        bad = [1, B - 1]
        case["hidden"][bad, 40] = poison
        got, _ = run(ops.decode_step, case)
        assert (got.status[bad] == 1).all() and (got.token[bad] == 0).all()
        assert got.logprob[bad].isnan().all()
        good = [b for b in range(B) if b not in bad]
        assert got.status[good].eq(0).all()
        for name, value in zip(got._fields, got, strict=True):
            assert torch.equal(bits(value[good]), bits(getattr(clean, name)[good])), name


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_thread_count_changes_no_bit(isa, dtype, mix_probs, seed):
    """The case is large enough for every phase to be shared between threads."""
    case = make_case(
        seed, 5, 300, 4000, 1, dtype, H=4, d_k=32, S=1200, sample=True, mix_probs=mix_probs,
        record_attention=True,
    )  # fmt: skip
    case["cache_length"] = torch.tensor([1199, 700, 0, 64, 1000], dtype=torch.int32)
    with threads(1):
        expected = run(ops.decode_step, case)
    for count in (2, 3, 7):
        with threads(count):
            got = run(ops.decode_step, case)
        assert_same_bits(got[0], expected[0], f"{count} threads")
        assert_same_bits(got[1], expected[1], f"{count} threads")


def test_runs_repeat(isa, dtype, seed):
    case = make_case(seed, 3, 100, 500, 2, dtype, sample=True, controls=True)
    expected = run(ops.decode_step, case)
    for _ in range(50):
        got = run(ops.decode_step, case)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


def test_calls_from_several_threads(seed):
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(seed, 2, 64, 300, 1, torch.bfloat16, sample=True)
    expected, _ = run(ops.decode_step, case)
    with ThreadPoolExecutor(4) as pool:
        for got, _ in pool.map(lambda _: run(ops.decode_step, case), range(200)):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_controls_follow_the_reference(isa, seed, mix_probs):
    values = torch.tensor([0.0, 0.25, 1.0, 1.7, 4.0, 0.5, 0.5])
    case = make_case(seed, 7, 20, 30, gate="logit", strength=values, mix_probs=mix_probs)
    case["gate_logit"] = torch.tensor([0.3, -2.0, 90.0, 1.0, -1e30, torch.inf, -torch.inf])
    for extra in ({}, {"gate_offset": torch.linspace(-3, 3, 7)}, {"alpha": torch.rand(7)}):
        got, _ = run(ops.decode_step, case | extra)
        truth, _ = run(reference.decode_step, in_double(case | extra))
        assert (got.alpha - truth.alpha).abs().max() < 4e-7
        assert mix_probs or extra or got.alpha[3] > 1
        assert torch.equal(got.gate_logit.double(), truth.gate_logit.float().double())
        assert (got.logits - truth.logits).abs().max() < 2e-5


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_a_head_that_is_switched_off_does_not_matter(isa, dtype, mix_probs, seed):
    """alpha 0 or 1 selects a head: by strength, by alpha, by an infinite gate logit. The other has
    NaN.
    """
    case = make_case(seed, 4, 40, 90, 1, dtype, gate="logit", mix_probs=mix_probs)
    expected, _ = run(ops.decode_step, case | {"alpha": torch.zeros(4)})
    broken = case | {"reward_weight": torch.full_like(case["reward_weight"], torch.nan)}
    ways = {
        "strength": {"strength": torch.zeros(4), "alpha": torch.full((4,), torch.nan)},
        "alpha": {"alpha": torch.zeros(4)},
        "logit": {"gate_logit": torch.full((4,), -torch.inf)},
    }
    for way in ways.values():
        got, _ = run(ops.decode_step, broken | way)
        assert got.status.eq(0).all() and got.alpha.eq(0).all()
        assert_same_bits(got._replace(gate_logit=expected.gate_logit), expected)
    broken = case | {"lm_weight": torch.full_like(case["lm_weight"], torch.nan)}
    got, _ = run(ops.decode_step, broken | {"gate_logit": torch.full((4,), torch.inf)})
    plain, _ = run(ops.decode_step, case | {"alpha": torch.ones(4)})
    assert_same_bits(got._replace(gate_logit=plain.gate_logit), plain)


def test_status_of_what_is_not_finite(isa, dtype, seed):
    case = make_case(seed, 3, 40, 90, 1, dtype, bias=True)
    nothing = torch.full((90,), -torch.inf, dtype=dtype)

    def status(**changes):
        got, _ = run(ops.decode_step, case | changes)
        assert ((got.token >= 0) & (got.token < 90)).all()
        assert (got.token[got.status != 0] == 0).all()
        return got.status.tolist()

    bias = case["lm_bias"].clone()
    bias[:-1] = -torch.inf  # a single token that is left is a valid distribution
    assert status(lm_bias=bias, reward_bias=bias[None]) == [0, 0, 0]
    assert status(lm_bias=nothing, reward_bias=nothing[None]) == [1, 1, 1]
    assert status(lm_bias=-nothing, reward_bias=-nothing[None]) == [1, 1, 1]
    assert status(lm_bias=nothing, alpha=torch.tensor([0.5, 1.0, 0.0])) == [1, 0, 1]
    assert status(alpha=torch.tensor([0.5, torch.nan, 0.0])) == [0, 1, 0]
    assert status(gate_offset=torch.tensor([torch.nan, torch.inf, -torch.inf])) == [1, 0, 0]
    poisoned = case["cache_k"].clone()
    poisoned[1] = torch.nan
    lengths, valid = torch.full((3,), 4, dtype=torch.int32), torch.ones(3, 9, dtype=torch.bool)
    seen = {"cache_k": poisoned, "cache_length": lengths, "cache_valid": valid}
    assert status(**seen) == [0, 1, 0]
    assert status(**seen, strength=torch.zeros(3)) == [0, 0, 0]
