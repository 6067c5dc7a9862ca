# SPDX-License-Identifier: Apache-2.0
"""The eager reference against an independent float64 NumPy computation."""

import math

import numpy as np
import numpy_model as npm
import pytest
import torch
from scipy import stats

from dualhead_ext import reference

SEEDS = [3, 14, 15]


def normal(generator, *shape, scale=0.5):
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def gate_weights(generator, d, g):
    shapes = [(g, d), (g, d), (g, d), (g, g), (1, g), (1,)]
    return [normal(generator, *shape) for shape in shapes]


def ragged_mask(generator, batch, length):
    return torch.rand(batch, length, generator=generator) > 0.3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("d", "heads", "size"), [(1, 1, 1), (7, 2, 3), (16, 3, 5)])
def test_gate_logit_is_the_papers(seed, d, heads, size):
    generator = torch.Generator().manual_seed(seed)
    hidden, mask = normal(generator, 3, 6, d), ragged_mask(generator, 3, 6)
    mask[0] = False  # a row that is all padding: alpha must be sigmoid(b_g)
    weights = gate_weights(generator, d, heads * size)
    got = reference.attention_gate_logit(hidden, *weights, heads, mask)
    plain = [w.numpy().squeeze() if w.shape[0] == 1 else w.numpy() for w in weights]
    plain[4], plain[5] = weights[4].numpy().reshape(-1), float(weights[5])
    plain[:4] = [w.numpy() for w in weights[:4]]
    for b in range(3):
        expected = npm.gate_logits(hidden[b].numpy(), mask[b].numpy(), plain, heads)
        np.testing.assert_allclose(got[b].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[0], weights[5].expand(6))


@pytest.mark.parametrize("seed", SEEDS)
def test_gate_is_causal(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weights = normal(generator, 2, 8, 5), gate_weights(generator, 5, 6)
    before = reference.attention_gate_logit(hidden, *weights, 2)
    hidden[:, 5] += 1.0
    after = reference.attention_gate_logit(hidden, *weights, 2)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_a_padded_gate_are_finite(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [w.requires_grad_() for w in gate_weights(generator, 4, 6)]
    hidden = normal(generator, 2, 5, 4)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    reference.attention_gate_logit(hidden, *weights, 3, mask).square().sum().backward()
    assert all(torch.isfinite(w.grad).all() for w in weights)


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 5.0), (2.0, 3.0)])
def test_mixture(mix, scale, cap):
    generator = torch.Generator().manual_seed(7)
    z_lm, z_rm = normal(generator, 5, 11, scale=4.0), normal(generator, 5, 11, scale=4.0)
    alpha = torch.tensor([0.0, 1e-9, 0.3, 1 - 1e-9, 1.0], dtype=torch.float64)
    got = reference.mix_logits(z_lm, z_rm, alpha, mix, scale, cap)
    for row in range(5):
        expected = npm.mixture(
            z_lm[row].numpy(), z_rm[row].numpy(), float(alpha[row]), mix, scale, cap
        )
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_a_head_that_is_switched_off_does_not_matter(mix):
    z_lm, bad = torch.randn(2, 5), torch.full((2, 5), torch.nan)
    off = reference.mix_logits(z_lm, bad, torch.zeros(2), mix)
    on = reference.mix_logits(bad, z_lm, torch.ones(2), mix)
    expected = z_lm if mix == "logits" else torch.log_softmax(z_lm, -1)
    assert torch.equal(off, expected) and torch.equal(on, expected)


def test_probability_mix_has_finite_gradients_when_the_gate_saturates():
    logit = torch.tensor([-200.0, -20.0, 20.0, 200.0], requires_grad=True)
    z = torch.randn(2, 4, 6, requires_grad=True)
    reference.mix_logits(z[0], z[1], torch.sigmoid(logit), "probs").square().sum().backward()
    assert torch.isfinite(logit.grad).all() and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("objectives", [1, 3])
def test_reward_logits(objectives):
    generator = torch.Generator().manual_seed(11)
    hidden, weight = normal(generator, 4, 6), normal(generator, objectives, 9, 6)
    bias, shares = normal(generator, objectives, 9), torch.rand(4, objectives, generator=generator)
    got = reference.reward_logits(hidden, weight, bias, shares)
    even = reference.reward_logits(hidden, weight, bias, None)
    for b in range(4):
        rows = [weight[k].numpy() @ hidden[b].numpy() + bias[k].numpy() for k in range(objectives)]
        expected = sum(float(shares[b, k]) * rows[k] for k in range(objectives))
        np.testing.assert_allclose(got[b].numpy(), expected, rtol=1e-6)  # shares are fp32
        np.testing.assert_allclose(even[b].numpy(), sum(rows) / objectives, rtol=1e-12)


def test_mixing_weight_controls():
    logit = torch.tensor([0.0, 2.0, torch.nan, 1.0])
    strength = torch.tensor([2.0, 0.5, 0.0, 9.0])
    weight = reference.mixing_weight(logit, None, strength)
    expected = [1.0, 0.5 * float(torch.sigmoid(logit[1])), 0.0, 9 * float(torch.sigmoid(logit[3]))]
    assert weight.tolist() == pytest.approx(expected)
    fixed = reference.mixing_weight(logit, torch.full((4,), 0.25), strength)
    assert fixed.tolist() == [0.5, 0.125, 0.0, 2.25]
    probs = reference.mixing_weight(logit, torch.full((4,), 0.25), strength, mix="probs")
    assert probs.tolist() == [0.5, 0.125, 0.0, 1.0]
    negative = reference.mixing_weight(logit, None, torch.tensor([-1.0]))
    assert negative[[0, 1, 3]].tolist() == [0.0, 0.0, 0.0]


def test_genarm_identity():
    """The logits mix at fixed a and temperature T(1-a) is pi_base * pi_r^(a/(1-a)) at temperature
    T."""
    z_lm, z_rm = torch.randn(2, 7, 50, dtype=torch.float64)
    for a, temperature in ((0.2, 1.0), (0.5, 0.7), (0.8, 1.3)):
        mixed = reference.mix_logits(z_lm, z_rm, torch.full((7,), a, dtype=torch.float64))
        ours = torch.log_softmax(mixed / (temperature * (1 - a)), -1)
        product = torch.log_softmax(z_lm, -1) + a / (1 - a) * torch.log_softmax(z_rm, -1)
        torch.testing.assert_close(ours, torch.log_softmax(product / temperature, -1))


def test_philox_known_answers():
    """Vectors of the Random123 distribution (kat_vectors, philox4x32-10), where our counters allow
    them.
    """
    # counter 0, key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    words = [npm.philox_word(0, 0, v) for v in range(4)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seeds = torch.tensor([0, -1, 123456789012345678, -(2**63)])
    draws = torch.tensor([0, 5, 2**40 + 3, 1])
    got = reference.philox_uniform(seeds, draws, 10)
    for row in range(4):
        for v in range(10):
            word = npm.philox_word(int(seeds[row]), int(draws[row]), v)
            uniform = np.float32((np.float32(word) + np.float32(0.5)) * 2.0**-32)
            expected = min(uniform, 1 - 2.0**-24)
            assert float(got[row, v]) == expected
    assert 0 < float(got.min()) and float(got.max()) < 1


FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_sampling_follows_the_filtered_distribution(filters):
    rows = 60_000
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -1.0, 1.5, 0.0, -3.0, 0.5, 0.5, -0.5])
    expected = npm.filtered_probabilities(logits.numpy(), **filters)
    kinds = {"top_k": torch.int32}
    arguments = {n: torch.full((rows,), v, dtype=kinds.get(n)) for n, v in filters.items()}
    seeds, draws = torch.arange(rows) * 7919, torch.zeros(rows, dtype=torch.int64)
    token = reference.sample_token(logits.expand(rows, -1), seeds, draws, **arguments)
    counts = np.bincount(token.numpy(), minlength=11)
    alive = expected > 0
    assert counts[~alive].sum() == 0
    if alive.sum() > 1:
        p_value = stats.chisquare(counts[alive], expected[alive] * rows).pvalue
        assert p_value > 1e-4, (counts, expected * rows)


def test_ties_at_a_cut_keep_the_lowest_indices():
    tied = torch.tensor([[1.0, 3.0, 3.0, 3.0, 3.0]])
    keep = reference.keep_mask(tied, torch.tensor([2], dtype=torch.int32), None, None)
    assert keep.tolist() == [[False, True, True, False, False]]
    keep = reference.keep_mask(tied, None, torch.tensor([1e-6]), None)
    assert keep.tolist() == [[False, True, False, False, False]]


def decode_arguments(generator, dtype, batch=3, d=10, vocab=13, heads=2, size=3, capacity=6):
    g = heads * size
    wq, wk, wv, wo, wg, bg = gate_weights(generator, d, g)
    arguments = {
        "hidden": normal(generator, batch, d),
        "lm_weight": normal(generator, vocab, d),
        "reward_weight": normal(generator, 1, vocab, d),
        "q_weight": wq,
        "k_weight": wk,
        "u_weight": reference.fold_values(wv, wo, wg, heads),
        "gate_bias": bg,
        "cache_k": torch.full((batch, heads, capacity, size), torch.nan, dtype=torch.float64),
        "cache_u": torch.full((batch, heads, capacity), torch.nan, dtype=torch.float64),
    }
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    arguments["cache_valid"] = torch.zeros(batch, capacity, dtype=torch.bool)
    arguments["cache_length"] = torch.zeros(batch, dtype=torch.int32)
    return arguments, [wq, wk, wv, wo, wg.reshape(-1), float(bg)]


@pytest.mark.parametrize("seed", SEEDS)
def test_steps_equal_the_papers_formulas(seed):
    """Folding, cache and mixture over several steps, with NaN in unused columns of the cache."""
    generator = torch.Generator().manual_seed(seed)
    arguments, gate = decode_arguments(generator, torch.float64)
    gate = [w if isinstance(w, float) else w.numpy() for w in gate]
    hidden = normal(generator, 4, 3, 10)
    for t in range(4):
        out = reference.decode_step(**arguments | {"hidden": hidden[t]}, record_attention=True)
        for b in range(3):
            past = hidden[: t + 1, b].numpy()
            logit = npm.gate_logits(past, np.ones(t + 1), gate, 2)[-1]
            assert float(out.gate_logit[b]) == pytest.approx(logit, rel=1e-10, abs=1e-12)
            z_lm = arguments["lm_weight"].numpy() @ past[-1]
            z_rm = arguments["reward_weight"][0].numpy() @ past[-1]
            z = npm.mixture(z_lm, z_rm, npm.sigmoid(logit), "logits", 1.0, 0.0)
            np.testing.assert_allclose(out.logits[b].numpy(), z, rtol=1e-10, atol=1e-12)
            assert int(out.token[b]) == int(np.argmax(z))
            assert float(out.logprob[b]) == pytest.approx(npm.log_softmax(z).max())
        assert torch.allclose(out.attention.sum(-1), torch.ones(3, 2, dtype=torch.float64))
        assert (out.attention[:, :, t + 1 :] == 0).all()
    assert arguments["cache_length"].tolist() == [4, 4, 4]


def test_a_full_row_is_left_alone_and_says_so():
    arguments, _ = decode_arguments(torch.Generator().manual_seed(1), torch.float32)
    arguments["cache_k"].normal_()
    arguments["cache_u"].normal_()
    arguments["cache_length"][:] = torch.tensor([6, 2, 6])
    arguments["seeds"], arguments["draws"] = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    before = {n: v.clone() for n, v in arguments.items() if n.startswith("cache") or n == "draws"}
    out = reference.decode_step(**arguments)
    assert out.status.tolist() == [2, 0, 2] and out.token[0] == 0
    assert arguments["cache_length"].tolist() == [6, 3, 6]
    assert arguments["draws"].tolist() == [0, 1, 0]
    for name, value in before.items():
        assert torch.equal(arguments[name][0], value[0]), name
    assert torch.isnan(out.logprob[0]) and torch.isfinite(out.logprob[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_alone(bad):
    arguments, _ = decode_arguments(torch.Generator().manual_seed(2), torch.float32)
    again = {n: v.clone() for n, v in arguments.items()}
    clean = reference.decode_step(**again)
    arguments["hidden"][1, 3] = bad
    out = reference.decode_step(**arguments)
    assert out.status.tolist() == [0, 1, 0] and int(out.token[1]) == 0
    for name in ("logits", "alpha", "token", "logprob"):
        assert torch.equal(getattr(out, name)[::2], getattr(clean, name)[::2]), name
