# SPDX-License-Identifier: Apache-2.0
"""The objective: values against float64 NumPy, gradients by gradcheck, edge cases, its effect."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DIFFERENTIABLE, OPTION_SETS, REWARD_HEADS, batch, numpy_loss, ranked
from torch import nn

from dualhead_ext import reference
from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss.terms import (
    ALPHA_BINS,
    GATE_STATISTICS,
    TOTAL_NAMES,
    LossCounts,
    LossOptions,
    metrics_of_totals,
)
from dualhead_ext.loss.totals import gate_statistics


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(0, 4),
    extra=st.integers(0, 3),
    length=st.integers(1, 7),
    d=st.sampled_from([1, 3, 8]),
    vocab=st.sampled_from([1, 2, 5, 17]),
    objectives=st.integers(1, 3),
    bias=st.booleans(),
    name=st.sampled_from(sorted(OPTION_SETS)),
    head=st.sampled_from(sorted(REWARD_HEADS)),
    named_objective=st.booleans(),
    weighted=st.booleans(),
    lists=st.booleans(),
)
def test_loss_is_the_formula_token_by_token(
    seed, pairs, extra, length, d, vocab, objectives, bias, name, head, named_objective, weighted,
    lists,
):  # fmt: skip
    extra = max(extra, 1) if pairs == 0 else extra
    t = batch(seed, 2 * pairs + extra, length, d, vocab, objectives, bias, head=head)
    generator = torch.Generator().manual_seed(seed)
    objective = torch.randint(0, objectives, (pairs,), generator=generator)
    which = {"num_pairs": pairs, "objective": objective if named_objective else None}
    if lists:
        which = ranked(seed, 2 * pairs + extra, objectives)
        pairs = len(which["pairs"])
    weights = torch.rand(objectives, generator=generator).double() if weighted else None
    options = OPTION_SETS[name]
    out = dual_head_loss(**t, **which, objective_weights=weights, **options)
    expected = numpy_loss(t, **which, objective_weights=weights, **options)
    got = (
        out.loss,
        out.lm_loss,
        out.preference_loss,
        out.gate_loss,
        out.kl_loss,
        out.l2_loss,
        out.chosen_logps,
        out.rejected_logps,
    )
    for value, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-10, atol=1e-12)
    if not lists:
        assert out.totals.shape == (pairs + extra, len(TOTAL_NAMES))
    totals = dict(zip(TOTAL_NAMES, out.totals.sum(0).tolist(), strict=True))
    assert totals["tokens"] == int(t["mask"].sum()) and totals["pairs"] == pairs
    metrics = metrics_of_totals(out.totals.sum(0), LossOptions(**options))
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=1e-9, abs=1e-12)


@pytest.mark.quick_cases(34)
@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize("name", sorted(OPTION_SETS))
@pytest.mark.parametrize("head", sorted(REWARD_HEADS))
def test_gradcheck(name, objectives, head):
    t = batch(7, rows=5, objectives=objectives, head=head)
    names = [n for n in DIFFERENTIABLE if n in t]
    leaves = [t.pop(n).requires_grad_(True) for n in names]
    extra = {"objective": torch.tensor([0, objectives - 1]), "num_pairs": 2}
    if objectives > 1:
        extra["objective_weights"] = torch.tensor([0.3, 1.2]).double()

    def loss(*tensors):
        out = dual_head_loss(
            **t, **dict(zip(names, tensors, strict=True)), **extra, **OPTION_SETS[name]
        )
        return 1.7 * out.loss

    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=0.0, fast_mode=head != "full")


def test_the_gate_gradient_formula():
    """dL/da = sum_v dz_v (z_RM,v - z_LM,v), the formula of the fused backward pass."""
    t = batch(3, rows=2, bias=False)
    t["gate_logit"].requires_grad_(True)
    out = dual_head_loss(**t, lambda_r=0.0, gate_regularizer="none")
    (gradient,) = torch.autograd.grad(out.loss, t["gate_logit"])
    for s in t["mask"][0].nonzero().flatten().tolist():
        h, a = t["hidden"][0, s], torch.sigmoid(t["gate_logit"][0, s].detach())
        z_lm, z_rm = t["lm_weight"] @ h, t["reward_weight"][0] @ h
        dz = torch.softmax((1 - a) * z_lm + a * z_rm, -1)
        dz[t["labels"][0, s]] -= 1
        expected = (dz * (z_rm - z_lm)).sum() * a * (1 - a)
        assert gradient[0, s].item() == pytest.approx(expected.item(), rel=1e-10)
    assert not gradient[1].any() and not gradient[0][~t["mask"][0]].any()


def test_a_prompt_shared_by_both_responses_cancels():
    """A prompt with equal hidden states on both sides does not change the margin."""
    t = batch(5, rows=4, length=9)
    t["mask"][:] = False
    t["mask"][:, 4:] = True
    t["labels"] = torch.randint(0, 6, (4, 9), generator=torch.Generator().manual_seed(1))
    for name in ("hidden", "labels", "gate_logit"):
        t[name][2:, :4] = t[name][:2, :4]
    masked = dual_head_loss(**t)
    t["mask"][:] = True
    counted = dual_head_loss(**t)
    assert not torch.allclose(masked.chosen_logps, counted.chosen_logps)
    torch.testing.assert_close(masked.preference_loss, counted.preference_loss)


def test_nothing_outside_the_mask_matters():
    t = batch(11, rows=6, length=8)
    t["hidden"].requires_grad_(True)
    before = dual_head_loss(**t)
    (gradient,) = torch.autograd.grad(before.loss, t["hidden"])
    assert not gradient[~t["mask"]].any() and gradient[t["mask"]].any()
    poisoned = {k: v.clone().detach() for k, v in t.items()}
    poisoned["hidden"][~t["mask"]] = math.nan
    poisoned["gate_logit"][~t["mask"]] = math.nan
    poisoned["labels"][~t["mask"]] = 2**40
    after = dual_head_loss(**poisoned)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.totals, after.totals)


def test_nan_under_the_mask_is_not_hidden():
    t = batch(11, rows=6, length=8)
    row, column = t["mask"].nonzero()[0].tolist()
    for name in ("hidden", "gate_logit"):
        poisoned = {k: v.clone() for k, v in t.items()}
        poisoned[name][row, column] = math.nan
        assert torch.isnan(dual_head_loss(**poisoned).loss)


@pytest.mark.parametrize("name", sorted(OPTION_SETS))
def test_no_supervised_token_is_zero_with_zero_gradients(name):
    t = batch(2, rows=4)
    t["mask"][:] = False
    for key in ("hidden", "gate_logit", "reward_weight", "reward_bias"):
        t[key].requires_grad_(True)
    out = dual_head_loss(**t, **OPTION_SETS[name])
    assert out.loss.item() == 0.0
    out.loss.backward()
    for key in ("hidden", "gate_logit", "reward_weight", "reward_bias"):
        assert t[key].grad is not None and not t[key].grad.any()


def test_an_empty_response_has_log_probability_zero_and_no_gradient():
    t = batch(2, rows=4)
    t["mask"][:] = True
    t["mask"][2] = False  # rejected side of the first pair
    t["labels"] = t["labels"].clamp(min=0)
    t["hidden"].requires_grad_(True)
    for reduction in ("sum", "mean"):
        out = dual_head_loss(**t, pref_reduction=reduction)
        (gradient,) = torch.autograd.grad(out.loss, t["hidden"])
        assert out.rejected_logps[0] == 0 and out.chosen_logps[0] != 0
        assert not gradient[2].any() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("name", ["default", "probs", "mixed", "mixed_probs", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite_and_right(name, dtype, scale):
    t = batch(4, rows=4, dtype=dtype)
    t["lm_weight"] *= scale
    t["reward_weight"] *= -scale
    for key in ("hidden", "gate_logit", "reward_weight"):
        t[key].requires_grad_(True)
    out = dual_head_loss(**t, **OPTION_SETS[name])
    gradients = torch.autograd.grad(out.loss, [t["hidden"], t["gate_logit"], t["reward_weight"]])
    assert all(torch.isfinite(g).all() for g in gradients)
    exact = {k: v.detach().double() if v.is_floating_point() else v.detach() for k, v in t.items()}
    wanted = dual_head_loss(**exact, **OPTION_SETS[name])
    torch.testing.assert_close(out.loss.double(), wanted.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("logit", [60.0, -60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_gate_keeps_its_gradient(mix, logit, dtype):
    t = batch(6, rows=4, dtype=dtype)
    t["gate_logit"] = torch.full_like(t["gate_logit"], logit, requires_grad=True)
    t["reward_weight"].requires_grad_(True)
    out = dual_head_loss(**t, mix=mix, lambda_g=0.0)
    gate, weight = torch.autograd.grad(out.loss, [t["gate_logit"], t["reward_weight"]])
    assert torch.isfinite(out.loss) and torch.isfinite(gate).all() and torch.isfinite(weight).all()
    chosen = t["mask"].clone()
    chosen[2:] = False
    # dL/dl = a (1-a) dL/da: e^-60 times a number of order 1.
    assert (gate[chosen] != 0).all() and gate.abs().max() < 1e-22


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_a_fixed_alpha_of_zero_or_one_selects_a_head(mix):
    t = batch(8, rows=4)
    heads = {-math.inf: ("lm_weight", "lm_bias"), math.inf: ("reward_weight", "reward_bias")}
    for logit, (weight, bias) in heads.items():
        t["gate_logit"] = torch.full_like(t["gate_logit"], logit, requires_grad=True)
        t["reward_weight"].requires_grad_(True)
        out = dual_head_loss(**t, mix=mix, lambda_r=0.0)
        gate, reward = torch.autograd.grad(out.loss, [t["gate_logit"], t["reward_weight"]])
        assert not gate.any() and out.gate_loss == 0
        assert bool(reward.any()) == (logit > 0)
        z = t["hidden"][:2] @ t[weight].reshape(-1, 3).T + t[bias].reshape(-1)
        logp = torch.log_softmax(z, -1).gather(-1, t["labels"][:2].clamp(min=0)[..., None])
        expected = -(logp.squeeze(-1) * t["mask"][:2]).sum() / 2
        torch.testing.assert_close(out.lm_loss, expected.detach())


@pytest.mark.parametrize("name", ["default", "mean", "mixed", "probs"])
@pytest.mark.parametrize("sizes", [[1] * 8, [3, 5], [2, 2, 4], [7, 1]])
def test_parts_with_the_counts_of_the_whole_add_up(name, sizes):
    """One batch of 8 pairs, 8 batches of 1, or batches of different sizes: the sums are the same.

    This holds for the loss, its terms and the gradients.
    """
    t = batch(9, rows=16, length=6)
    per_row = ("hidden", "labels", "mask", "gate_logit")
    t["reward_weight"].requires_grad_(True)
    whole = dual_head_loss(**t, **OPTION_SETS[name])
    (expected,) = torch.autograd.grad(whole.loss, t["reward_weight"])
    parts, start = [], 0
    for size in sizes:
        index = [*range(start, start + size), *range(8 + start, 8 + start + size)]
        parts.append({k: v[index] if k in per_row else v for k, v in t.items()})
        start += size
    counts = [LossCounts.of_lengths(part["mask"].sum(-1)) for part in parts]
    counts = sum(counts[1:], start=counts[0])
    outs = [dual_head_loss(**part, counts=counts, **OPTION_SETS[name]) for part in parts]
    torch.testing.assert_close(sum(o.loss for o in outs), whole.loss)
    for term in ("lm_loss", "preference_loss", "gate_loss"):
        torch.testing.assert_close(sum(getattr(o, term) for o in outs), getattr(whole, term))
    torch.testing.assert_close(torch.cat([o.totals for o in outs]), whole.totals)
    (gradient,) = torch.autograd.grad(sum(o.loss for o in outs), t["reward_weight"])
    torch.testing.assert_close(gradient, expected)


def test_objectives_reach_their_own_head_only():
    t = batch(10, rows=8, objectives=3)
    t["mask"][:] = True
    t["labels"] = t["labels"].clamp(min=0)
    t["reward_weight"].requires_grad_(True)
    out = dual_head_loss(**t, objective=torch.tensor([2, 2, 0, 2]), lm_on_chosen=False)
    (gradient,) = torch.autograd.grad(out.loss, t["reward_weight"])
    assert gradient[0].any() and gradient[2].any() and not gradient[1].any()


def test_one_head_may_be_given_without_its_dimension():
    t = batch(12)
    flat = {**t, "reward_weight": t["reward_weight"][0], "reward_bias": t["reward_bias"][0]}
    assert torch.equal(dual_head_loss(**t).loss, dual_head_loss(**flat).loss)


def test_logits_equal_those_of_the_reference_head():
    """The loss and the decoder use the same mixture."""
    t = batch(13, rows=2, vocab=5, bias=False)
    t["mask"][:], t["labels"] = True, t["labels"].clamp(min=0)
    for mix in ("logits", "probs"):
        z_lm = reference.head_logits(t["hidden"], t["lm_weight"], None)
        z_rm = reference.reward_logits(t["hidden"], t["reward_weight"], None, None)
        alpha = reference.mixing_weight(t["gate_logit"])
        mixed = reference.mix_logits(z_lm, z_rm, alpha, mix, 0.5, 4.0)
        logps = torch.log_softmax(mixed, -1).gather(-1, t["labels"][..., None]).squeeze(-1)
        out = dual_head_loss(**t, mix=mix, pref_on="mixed", logit_scale=0.5, logit_softcap=4.0)
        torch.testing.assert_close(out.chosen_logps, logps[:1].sum(-1))
        torch.testing.assert_close(out.rejected_logps, logps[1:].sum(-1))


# --- the regulariser's effect --------------------------------------------------------------------


def trained_gate(regularizer, steps=400):
    """alpha for a tiny problem, after training gate and reward head with a large lambda_G."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 6, 8, generator=generator)
    labels = torch.randint(0, 12, (16, 6), generator=generator)
    lm_weight = torch.randn(12, 8, generator=generator)
    reward = nn.Parameter(lm_weight[None].clone())
    gate = nn.Linear(8, 1)
    nn.init.normal_(gate.weight, std=0.3, generator=generator)
    nn.init.zeros_(gate.bias)
    optimizer = torch.optim.AdamW([reward, *gate.parameters()], lr=0.02, weight_decay=0.0)
    mask = torch.ones(16, 6, dtype=torch.bool)
    for _ in range(steps):
        logit = gate(hidden).squeeze(-1)
        out = dual_head_loss(
            hidden,
            labels,
            mask,
            logit,
            lm_weight=lm_weight,
            reward_weight=reward,
            gate_regularizer=regularizer,
            lambda_g=1.0,
            lm_reduction="mean",
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return torch.sigmoid(gate(hidden)).detach(), out


def test_the_printed_sign_collapses_the_gate_and_the_default_does_not():
    default, default_out = trained_gate("entropy")
    printed, printed_out = trained_gate("entropy_as_printed")

    def collapsed(alpha):
        return ((alpha < 0.05) | (alpha > 0.95)).float().mean().item()

    assert collapsed(printed) > 0.7 and collapsed(default) < 0.05
    default, printed = (
        dict(zip(TOTAL_NAMES, out.totals.sum(0), strict=True)) for out in (default_out, printed_out)
    )
    ends = ("alpha_near_0", "alpha_near_1")
    assert sum(default[n] for n in ends) == 0 and sum(printed[n] for n in ends) > 48
    assert printed["entropy"] < 0.3 * default["entropy"]


def test_gate_statistics_are_those_of_the_alphas():
    alpha = torch.tensor([0.0, 0.005, 0.0999, 0.101, 0.5, 0.95, 0.995, 1.0]).double()
    found = gate_statistics(torch.logit(alpha))
    assert tuple(found) == GATE_STATISTICS
    assert torch.allclose(found["alpha"], alpha) and torch.allclose(
        found["alpha_squared"], alpha**2
    )
    assert found["alpha_near_0"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert found["alpha_near_1"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    bins = torch.stack([found[f"alpha_bin_{i}"] for i in range(ALPHA_BINS)])
    assert bins.sum(-1).tolist() == torch.histc(alpha, ALPHA_BINS, 0, 1).tolist()
    undefined = gate_statistics(torch.tensor([math.nan]))
    assert sum(undefined[f"alpha_bin_{i}"].item() for i in range(ALPHA_BINS)) == 0
