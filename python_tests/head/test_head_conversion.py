# SPDX-License-Identifier: Apache-2.0
"""Conversions of a head: merged, expanded, compressed, and with a larger vocabulary."""

import pytest
import torch
from test_reward_heads import KINDS, D, V, make_head

from dualhead_ext import reference

ALL = [("full", 1), *KINDS]


def sizes(kind, **config):
    return {"reward_head": kind[0], "reward_rank": kind[1], "num_objectives": 2} | config


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_merge_fixed_is_the_head_at_a_fixed_alpha(kind, bias):
    head = make_head(**sizes(kind, bias=bias, gate="fixed", gate_alpha=0.3))
    hidden, shares = torch.randn(2, 3, D).double(), torch.tensor([0.4, 1.1]).double()
    for strength in (1.0, 1.7, 5.0):
        linear = head.merge_fixed(objective_weights=shares, strength=strength)
        expected = head(hidden, strength=strength, objective_weights=shares).logits
        torch.testing.assert_close(linear(hidden), expected)
    torch.testing.assert_close(head.merge_fixed(0.6)(hidden), head(hidden, alpha=0.6).logits)


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_merge_objectives_decodes_as_the_weights_do(kind, mix):
    head = make_head(**sizes(kind, mix=mix))
    hidden, shares = torch.randn(2, 3, D).double(), torch.tensor([-0.4, 1.3]).double()
    merged = head.merge_objectives(shares)
    assert merged.config.num_objectives == 1 and merged.lm_weight is head.lm_weight
    assert kind[0] == "full" or merged.config.reward_rank == 2 * kind[1]
    expected = head(hidden, objective_weights=shares).logits
    torch.testing.assert_close(merged(hidden).logits, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_expand_says_the_same(kind, bias):
    head = make_head(**sizes(kind, bias=bias))
    full, hidden = head.expand(), torch.randn(2, 3, D).double()
    assert full.config.reward_head == "full" and full.lm_weight is head.lm_weight
    shares = torch.tensor([0.3, 0.7]).double()
    for controls in ({}, {"objective_weights": shares}, {"strength": 1.7}):
        expected = head(hidden, **controls).logits
        torch.testing.assert_close(full(hidden, **controls).logits, expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compress_finds_a_correction_again(kind):
    head = make_head(**sizes(kind, bias=True))
    back, error = head.expand().compress(*kind)
    hidden = torch.randn(2, 3, D).double()
    assert error.shape == (2,) and error.max() < 1e-6
    torch.testing.assert_close(back(hidden).logits, head(hidden).logits)
    other = {"embedding": "lowrank", "lowrank": "embedding"}[kind[0]]
    rank = max(kind[1], 1)
    as_other = head.compress(other, rank).error
    # W_LM (M h + c) is of low rank, but B A h + b is seldom in the LM head's column space.
    assert as_other.max() < 1e-6 if other == "lowrank" else as_other.min() > 0.1


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["embedding", "lowrank"])
def test_compress_loses_what_it_says_and_less_with_hidden_states(kind, given):
    head = make_head(**sizes(("full", 1), bias=True))
    hidden = torch.randn(4000, D).double() * torch.linspace(0.1, 3, D) + 0.5

    def lost(other):
        deltas = []
        for one in (head, other):
            z_lm = reference.head_logits(hidden[:, None], one.lm_weight, one.lm_bias)
            row = torch.tensor([[1.0, 0.0]]).double().expand(len(hidden), 2)
            deltas.append(one.reward_logits(hidden[:, None], z_lm, row) - z_lm)
        return float((deltas[0] - deltas[1]).square().sum() / deltas[0].square().sum()) ** 0.5

    errors = []
    for rank in (1, 4, 12, D):
        back, error = head.compress(kind, rank, hidden if given else None)
        errors.append(float(error[0]))
        if given:
            assert lost(back) == pytest.approx(float(error[0]), abs=1e-6)
            assert lost(back) <= lost(head.compress(kind, rank).head) + 1e-9
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 if kind == "lowrank" else errors[-1] > 0.1


def test_without_hidden_states_the_error_is_the_singular_values():
    head = make_head(**sizes(("full", 1)))
    values = torch.linalg.svdvals(head.reward_head.weight[1] - head.lm_weight)
    expected = (values[5:].square().sum() / values.square().sum()).sqrt()
    assert float(head.compress("lowrank", 5).error[1]) == pytest.approx(float(expected))


def test_refusals():
    head = make_head(**sizes(("full", 1)))
    for arguments, message in (
        (("full", 1), "kind must be"),
        (("lowrank", 0), "reward_rank must be at least 1"),
        (("lowrank", D + 1), f"rank must be at most {D}"),
        (("embedding", 1, torch.randn(3, D + 1)), r"hidden must be \(\.\.\., 24\)"),
        (("embedding", 1, torch.full((3, D), torch.nan)), "hidden must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            head.compress(*arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ALL, ids=str)
@pytest.mark.parametrize("size", [V - 4, V + 5])
def test_a_reward_head_follows_the_vocabulary(kind, size, bias):
    head = make_head(**sizes(kind, bias=bias))
    weight = torch.randn(size, D).double()
    kept = min(size, V)
    weight[:kept] = head.lm_weight[:kept]
    lm_bias = torch.randn(size).double() if bias else None
    if bias:
        lm_bias[:kept] = head.lm_bias[:kept]
    hidden, labels = torch.randn(4, D).double(), torch.tensor([0, kept - 1, 3, size - 1])
    before = head.reward_head.token_rewards(
        hidden[:3], labels[:3], head.lm_weight, head.lm_bias
    ).detach()
    head.reward_head.resize(weight, lm_bias)
    after = head.reward_head.token_rewards(hidden, labels, weight, lm_bias)
    torch.testing.assert_close(after[:, :3], before)
    if size > V and kind[0] != "embedding":
        assert not after[:, 3].any()
