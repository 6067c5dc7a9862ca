# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn by the fused CPU step: distribution, edge cases of filters, and the reference's
tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from decode_cases import assert_same_bits, run
from sampling_cases import FILTERS, assert_distribution, case_of_logits, filtered_probabilities

from dualhead_ext import ops, reference


def draw(logits: torch.Tensor, seed: int, calls: int = 1, **options) -> torch.Tensor:
    """Draw calls x rows tokens."""
    case = case_of_logits(logits, seed, **options)
    with torch.no_grad():
        return torch.cat([ops.decode_step(**case).token for _ in range(calls)])


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_distribution_of_200000_draws(filters, seed):
    logits = torch.randn(37, generator=torch.Generator().manual_seed(seed)) * 1.5
    tokens = draw(logits, seed, calls=50, rows=4096, **filters)
    assert_distribution(tokens, filtered_probabilities(logits, **filters))


def test_distribution_of_the_mixture(seed):
    """The probability mix draws from (1-a) softmax(z_LM) + a softmax(z_RM)."""
    a = 0.3
    case = case_of_logits(torch.randn(23), seed, rows=4096, mix_probs=True)
    case["reward_weight"] = torch.randn(1, 23, 1)
    case["alpha"] = torch.full((4096,), a)
    with torch.no_grad():
        tokens = torch.cat([ops.decode_step(**case).token for _ in range(50)])
    heads = (case["lm_weight"][:, 0], case["reward_weight"][0, :, 0])
    lm, rm = (torch.softmax(head.double(), 0) for head in heads)
    assert_distribution(tokens, (1 - a) * lm + a * rm)


def test_draws_of_one_request_are_independent(seed):
    """Pairs of consecutive draws with one seed follow the product distribution."""
    logits = torch.tensor([0.0, 1.0, -0.5, 0.3])
    tokens = draw(logits, seed, calls=200, rows=1000).view(200, 1000)
    p = torch.softmax(logits.double(), 0)
    pairs = (tokens[:-1] * 4 + tokens[1:]).flatten()
    assert_distribution(pairs[::2], (p[:, None] * p).flatten())


def test_neighbouring_seeds_are_independent(seed):
    case = case_of_logits(torch.zeros(5), seed, rows=20000)
    case["seeds"] = torch.arange(20000)
    got, _ = run(ops.decode_step, case)
    pairs = got.token[0::2] * 5 + got.token[1::2]
    assert_distribution(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))


@pytest.mark.parametrize("V", [5, 64, 1000, 20011])
def test_tokens_equal_the_references(V, seed):
    """Every filter at random strength. Tokens differ only if rounding decides which score is
    larger.
    """
    B = max(16, 40000 // V)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, V, generator=generator) * 2
    logits[: B // 2] = (logits[: B // 2] * 4).round() / 4  # many ties

    def uniform():
        return torch.rand(B, generator=generator)

    filters = {
        "temperature": torch.where(uniform() < 0.1, 0.0, uniform() * 2),
        "top_k": torch.where(uniform() < 0.5, 0.0, uniform() * V).int(),
        "top_p": torch.where(uniform() < 0.4, 1.0, uniform()),
        "min_p": torch.where(uniform() < 0.5, 0.0, uniform() ** 3),
    }
    case = case_of_logits(logits, seed, **filters)
    ours, state = run(ops.decode_step, case)
    theirs, expected_state = run(reference.decode_step, case)
    assert_same_bits(state, expected_state)
    for b in (ours.token != theirs.token).nonzero().flatten().tolist():
        scaled = logits[b] / filters["temperature"][b]
        uniforms = reference.philox_uniform(case["seeds"][b : b + 1], case["draws"][b : b + 1], V)
        score = scaled.double() - torch.log(-torch.log1p(-uniforms[0].double()))
        margin = (score[ours.token[b]] - score[theirs.token[b]]).abs()
        assert margin < 1e-5, (b, ours.token[b], theirs.token[b], margin)
    exact = torch.log_softmax(logits.double(), 1).gather(1, ours.token[:, None])[:, 0]
    assert (ours.logprob - exact).abs().max() < 1e-5


# --- edges ----------------------------------------------------------------------------------------


def support(logits, seed, **filters) -> list[int]:
    tokens = draw(torch.as_tensor(logits), seed, rows=4000, **filters)
    return sorted(set(tokens.tolist()))


def test_equal_logits_at_a_cut_keep_the_lowest_indices(seed):
    equal = torch.zeros(8)
    assert support(equal, seed) == list(range(8))
    assert support(equal, seed, top_k=3) == [0, 1, 2]
    # The mass before the n-th token is (n - 1) / 8; the token is kept if that is below top_p.
    assert support(equal, seed, top_p=0.25) == [0, 1]
    assert support(equal, seed, top_p=0.25001) == [0, 1, 2]
    # top_p applies to what top_k keeps, renormalised
    assert support(equal, seed, top_k=4, top_p=0.5) == [0, 1]
    assert support(equal, seed, min_p=1.0) == list(range(8))
    assert support([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], seed, top_k=2) == [1, 3]
    assert support([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], seed, top_k=4) == [0, 1, 3, 4]
    assert support([-0.0, 0.0, -0.0, 0.0], seed, top_k=3) == [0, 1, 2]


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-30}, {"min_p": 1.1},
                                     {"top_p": math.nan}, {"min_p": math.nan}])  # fmt: skip
def test_the_top_token_is_always_kept(filters, seed):
    assert support([0.0, 2.0, 1.0, 2.0], seed, **filters) == [1]


def test_filters_that_are_off(seed):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    expected = draw(logits, seed, rows=500)
    for off in ({"top_k": 0}, {"top_k": -3}, {"top_k": 50}, {"top_p": 1.0}, {"top_p": 2.0},
                {"min_p": 0.0}, {"min_p": -1.0}, {"temperature": 1.0}):  # fmt: skip
        assert torch.equal(draw(logits, seed, rows=500, **off), expected), off


def test_min_p_compares_in_double(seed):
    """A token with p = min_p p_max is kept, and one whose x is an ulp smaller is not."""
    # The nearest fp32 value is just below log 0.5
    edge = torch.tensor(math.log(0.5), dtype=torch.float32)
    above = torch.nextafter(edge, torch.tensor(0.0))
    assert support(torch.stack((torch.tensor(0.0), edge)), seed, min_p=0.5) == [0]
    assert support(torch.stack((torch.tensor(0.0), above)), seed, min_p=0.5) == [0, 1]
    assert support([0.0, 0.0, -1.0], seed, min_p=1.0) == [0, 1]


def test_masked_tokens_are_never_drawn(seed):
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert support(logits, seed) == [1, 3]
    assert support(logits, seed, top_k=4) == [1, 3]
    assert support(logits, seed, top_p=0.999) == [1, 3]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e30, math.inf, math.nan, -1.0])
def test_extreme_temperatures(temperature, seed):
    """Logits that overflow are equal at infinity; the lowest index that is kept wins."""
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(seed))
    logits[1] -= 100.0
    logits[2] += 100.0
    for filters in ({}, {"top_k": 7}, {"min_p": 0.2}):
        case = case_of_logits(logits, seed, temperature=temperature, **filters)
        ours, _ = run(ops.decode_step, case)
        theirs, _ = run(reference.decode_step, case)
        assert torch.equal(ours.token, theirs.token), filters
    tokens = draw(logits, seed, temperature=temperature, top_p=0.9)
    assert ((tokens >= 0) & (tokens < 70)).all()


def test_top_p_deep_in_the_tail(seed):
    """The cut falls among hundreds of tokens below e^-32 of the largest, and among equal tokens."""
    logits = torch.cat((torch.zeros(1), torch.full((500,), -40.0), torch.full((500,), -50.0)))
    case = case_of_logits(logits, seed, rows=64, top_p=1 - 2**-24, top_k=700)
    ours, _ = run(ops.decode_step, case)
    assert (ours.token == 0).all()
    flat = torch.zeros(3000)
    assert draw(flat, seed, rows=2000, top_p=0.01).max() < 30


def test_temperature_zero_is_greedy_and_still_counts(seed):
    logits = torch.randn(6, 90, generator=torch.Generator().manual_seed(seed))
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.7])
    case = case_of_logits(logits, seed, temperature=temperature)
    got, state = run(ops.decode_step, case)
    greedy = temperature == 0
    assert torch.equal(got.token[greedy], logits.argmax(1)[greedy])
    assert torch.equal(state["draws"], case["draws"] + 1)


def test_draws_count_and_choose(seed):
    """Only the counter advances a request to its next draw. It does not wrap after 2^32 draws."""
    logits = torch.zeros(1000)
    case = case_of_logits(logits, seed, rows=3)
    case["seeds"][:] = 5
    case["draws"] = torch.tensor([0, 2**32, 2**33 - 1])
    first, state = run(ops.decode_step, case)
    assert len(set(first.token.tolist())) == 3
    assert state["draws"].tolist() == [1, 2**32 + 1, 2**33]
    again, _ = run(ops.decode_step, case)
    assert torch.equal(first.token, again.token)
    moved, _ = run(ops.decode_step, case | {"draws": case["draws"] + 1})
    assert not torch.equal(first.token, moved.token)


def test_logprob_is_before_temperature_and_filters(seed):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(seed))
    case = case_of_logits(logits, seed, temperature=3.0, top_k=4, min_p=0.1)
    got, _ = run(ops.decode_step, case)
    exact = torch.log_softmax(logits.double(), 1).gather(1, got.token[:, None])[:, 0]
    assert (got.logprob - exact).abs().max() < 1e-6
