# SPDX-License-Identifier: Apache-2.0
"""dual_head_loss: values against float64 NumPy, gradients against gradcheck, edge cases, errors."""

import math
import re

import numpy as np
import numpy_model as npm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dualhead_ext import reference
from dualhead_ext.functional import dual_head_loss
from dualhead_ext.losses import TOTAL_NAMES, LossCounts

OPTION_SETS = {
    "default": {},
    "probs": {"mix": "probs"},
    "mean": {"lm_reduction": "mean", "pref_reduction": "mean"},
    "mixed": {"pref_on": "mixed"},
    "mixed_probs": {"pref_on": "mixed", "mix": "probs"},
    "smoothing": {"label_smoothing": 0.2, "gamma": 0.5, "beta_r": 1.3},
    "printed": {"gate_regularizer": "entropy_as_printed", "lambda_g": 0.7},
    "no_regularizer": {"gate_regularizer": "none"},
    "no_lm": {"lm_on_chosen": False},
    "post": {"logit_scale": 0.5, "logit_softcap": 3.0},
    "post_probs": {"logit_scale": 2.0, "logit_softcap": 5.0, "mix": "probs", "pref_on": "mixed"},
    "weights": {"lambda_r": 0.3, "lambda_g": 0.4},
}


def batch(seed, rows=4, length=5, d=3, vocab=6, objectives=1, bias=True, dtype=torch.float64):
    """Arguments of a random problem; some responses are empty, some fill the row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.rand(rows, length, generator=g) < torch.rand(rows, 1, generator=g) * 1.4 - 0.1
    labels = torch.randint(0, vocab, (rows, length), generator=g)
    labels = torch.where(mask, labels, torch.full_like(labels, -100))
    tensors = {
        "hidden": normal(rows, length, d),
        "labels": labels,
        "mask": mask,
        "gate_logit": (normal(rows, length) * 3).to(reference.accumulator_dtype(dtype)),
        "lm_weight": normal(vocab, d),
        "reward_weight": normal(objectives, vocab, d),
    }
    if bias:
        tensors["lm_bias"] = normal(vocab)
        tensors["reward_bias"] = normal(objectives, vocab)
    return tensors


def numpy_loss(
    t,
    num_pairs,
    objective=None,
    objective_weights=None,
    mix="logits",
    beta_r=0.1,
    lambda_r=1.0,
    lambda_g=0.01,
    gate_regularizer="entropy",
    lm_reduction="sum",
    pref_on="reward",
    pref_reduction="sum",
    gamma=0.0,
    label_smoothing=0.0,
    lm_on_chosen=True,
    logit_scale=1.0,
    logit_softcap=0.0,
):
    """The objective token by token: (loss, lm, pref, gate, chosen sums, rejected sums)."""
    a = {k: v.numpy() for k, v in t.items()}
    rows, length = a["mask"].shape
    heads = len(a["reward_weight"])
    shares = np.full(heads, 1 / heads) if objective_weights is None else objective_weights.numpy()

    def post(z):
        return npm.post(z, logit_scale, logit_softcap)

    def mixture(z_lm, z_rm, alpha):
        z = npm.mixture(z_lm, z_rm, alpha, mix, logit_scale, logit_softcap)
        return npm.log_softmax(z) if mix == "logits" else z

    sums, lengths = np.zeros(rows), np.zeros(rows, dtype=int)
    lm_total, lm_tokens, entropies = 0.0, 0, []
    for r in range(rows):
        k = 0 if objective is None or r >= 2 * num_pairs else objective[r % num_pairs]
        for s in range(length):
            if not a["mask"][r, s]:
                continue
            h, y = a["hidden"][r, s], a["labels"][r, s]
            alpha = npm.sigmoid(a["gate_logit"][r, s])
            z_lm = a["lm_weight"] @ h + a.get("lm_bias", 0)
            bias = a.get("reward_bias", np.zeros((heads, 1)))
            z_heads = [a["reward_weight"][j] @ h + bias[j] for j in range(heads)]
            z_rm = sum(w * z for w, z in zip(shares, z_heads, strict=True))
            entropies.append(-alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha))
            lengths[r] += 1
            if r < 2 * num_pairs:
                if pref_on == "reward":
                    sums[r] += npm.log_softmax(post(z_heads[k]))[y]
                else:
                    one = objective is None and objective_weights is None and heads == 1
                    sums[r] += mixture(z_lm, z_rm if one else z_heads[k], alpha)[y]
            if r >= 2 * num_pairs or (r < num_pairs and lm_on_chosen):
                lm_total -= mixture(z_lm, z_rm, alpha)[y]
                lm_tokens += 1
    sequences = rows - 2 * num_pairs + (num_pairs if lm_on_chosen else 0)
    lm = lm_total / max(1, sequences if lm_reduction == "sum" else lm_tokens)
    pref = 0.0
    for p in range(num_pairs):
        n_chosen, n_rejected = lengths[p], lengths[num_pairs + p]
        if n_chosen + n_rejected == 0:
            continue
        chosen, rejected = sums[p], sums[num_pairs + p]
        if pref_reduction == "mean":
            chosen, rejected = chosen / max(1, n_chosen), rejected / max(1, n_rejected)
        m = beta_r * (chosen - rejected) - gamma
        right, wrong = np.logaddexp(0, -m), np.logaddexp(0, m)
        pref += (1 - label_smoothing) * right + label_smoothing * wrong
    pref /= max(1, num_pairs)
    sign = {"entropy": -1.0, "entropy_as_printed": 1.0, "none": 0.0}[gate_regularizer]
    gate = lambda_g * sign * (sum(entropies) / max(1, len(entropies)))
    total = lm + lambda_r * pref + gate
    return total, lm, pref, gate, sums[:num_pairs], sums[num_pairs : 2 * num_pairs]


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
    named_objective=st.booleans(),
    weighted=st.booleans(),
)
def test_loss_is_the_formula_token_by_token(
    seed, pairs, extra, length, d, vocab, objectives, bias, name, named_objective, weighted
):
    extra = max(extra, 1) if pairs == 0 else extra
    t = batch(seed, 2 * pairs + extra, length, d, vocab, objectives, bias)
    generator = torch.Generator().manual_seed(seed)
    objective = torch.randint(0, objectives, (pairs,), generator=generator)
    objective = objective if named_objective else None
    weights = torch.rand(objectives, generator=generator).double() if weighted else None
    options = OPTION_SETS[name]
    out = dual_head_loss(
        **t, num_pairs=pairs, objective=objective, objective_weights=weights, **options
    )
    expected = numpy_loss(t, pairs, objective, weights, **options)
    got = (
        out.loss,
        out.lm_loss,
        out.preference_loss,
        out.gate_loss,
        out.chosen_logps,
        out.rejected_logps,
    )
    for value, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=1e-10, atol=1e-12)
    totals = dict(zip(TOTAL_NAMES, out.totals.tolist(), strict=True))
    assert totals["tokens"] == int(t["mask"].sum()) and totals["pairs"] == pairs


@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize("name", sorted(OPTION_SETS))
def test_gradcheck(name, objectives):
    t = batch(7, rows=5, objectives=objectives)
    names = ["hidden", "gate_logit", "lm_weight", "lm_bias", "reward_weight", "reward_bias"]
    leaves = [t.pop(n).requires_grad_(True) for n in names]
    extra = {"objective": torch.tensor([0, objectives - 1]), "num_pairs": 2}
    if objectives > 1:
        extra["objective_weights"] = torch.tensor([0.3, 1.2]).double()

    def loss(*tensors):
        out = dual_head_loss(
            **t, **dict(zip(names, tensors, strict=True)), **extra, **OPTION_SETS[name]
        )
        return 1.7 * out.loss

    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=0.0)


def test_the_gate_gradient_is_the_identity_of_the_kernels():
    """dL/da = sum_v dz_v (z_RM,v - z_LM,v), the form that a fused backward uses."""
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
    """Counted or masked, a prompt with the same hidden states on both sides leaves the margin."""
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
    """1 x 8 = 8 x 1 = 3 + a last partial window: loss, terms and gradients."""
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
    counts = [LossCounts.of_batch(part["mask"]) for part in parts]
    counts = sum(counts[1:], start=counts[0])
    outs = [dual_head_loss(**part, counts=counts, **OPTION_SETS[name]) for part in parts]
    torch.testing.assert_close(sum(o.loss for o in outs), whole.loss)
    for term in ("lm_loss", "preference_loss", "gate_loss", "totals"):
        torch.testing.assert_close(sum(getattr(o, term) for o in outs), getattr(whole, term))
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
    """The mixture of the loss and the mixture that decodes are one model."""
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


# --- dtypes, autograd ----------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lm", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reward", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes(hidden, lm, reward, autocast):
    t = batch(14, rows=4, d=8, dtype=torch.float32)
    t["hidden"] = t["hidden"].to(hidden)
    for key in ("lm_weight", "lm_bias"):
        t[key] = t[key].to(lm)
    for key in ("reward_weight", "reward_bias"):
        t[key] = t[key].to(reward).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = dual_head_loss(**t)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and out.chosen_logps.dtype == torch.float32
    assert t["reward_weight"].grad.dtype == reward
    exact = {k: v.detach().double() if v.is_floating_point() else v.detach() for k, v in t.items()}
    wanted = dual_head_loss(**exact)
    # Products rounded to 8 bits of mantissa at logits of order 10, or not at all.
    loose = autocast or torch.bfloat16 in (lm, reward)
    tolerance = 5e-2 if loose else 2e-5
    torch.testing.assert_close(out.loss.double(), wanted.loss, rtol=tolerance, atol=tolerance)


def test_autocast_runs_the_products_in_bf16():
    t = batch(14, rows=4, d=8, dtype=torch.float32)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.nn.functional.linear:
                seen.append(result.dtype)
            return result

    with Watch(), torch.autocast("cpu", dtype=torch.bfloat16):
        dual_head_loss(**t)
    assert seen and set(seen) == {torch.bfloat16}


def test_the_lm_head_works_for_chosen_responses_alone():
    """z_LM is computed where the language model term needs it, and tokens are dropped before."""
    t = batch(15, rows=6, length=7, bias=False)
    seen = {}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                seen.setdefault(args[1].data_ptr(), []).append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        dual_head_loss(**t)
    chosen, rejected = int(t["mask"][:3].sum()), int(t["mask"][3:].sum())
    assert sum(seen[t["lm_weight"].data_ptr()]) == chosen
    assert sum(seen[t["reward_weight"].data_ptr()]) == chosen + rejected


def test_upstream_gradient_twice_and_inputs_unchanged():
    t = batch(16, rows=4)
    t["reward_weight"].requires_grad_(True)
    copies = {k: v.detach().clone() for k, v in t.items()}
    out = dual_head_loss(**t)
    (one,) = torch.autograd.grad(out.loss, t["reward_weight"], retain_graph=True)
    (scaled,) = torch.autograd.grad(
        out.loss, t["reward_weight"], grad_outputs=torch.tensor(-2.5).double()
    )
    torch.testing.assert_close(scaled, -2.5 * one)
    assert all(torch.equal(copies[k], v.detach()) for k, v in t.items())


def test_strided_inputs():
    t = batch(17, rows=4, length=6)
    expected = dual_head_loss(**t).loss
    strided = dict(t)
    strided["hidden"] = t["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["reward_weight"] = t["reward_weight"].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(4, 12, dtype=torch.float64)
    wide[:, ::2] = t["gate_logit"]
    strided["gate_logit"] = wide[:, ::2]
    assert not any(strided[k].is_contiguous() for k in ("hidden", "reward_weight", "gate_logit"))
    torch.testing.assert_close(dual_head_loss(**strided).loss, expected)


def test_detached_terms_do_not_hold_the_graph():
    out = dual_head_loss(**{**batch(18), "lm_weight": batch(18)["lm_weight"].requires_grad_()})
    assert out.loss.requires_grad
    for name in ("lm_loss", "preference_loss", "gate_loss", "chosen_logps", "totals"):
        assert not getattr(out, name).requires_grad


# --- the regulariser on data ---------------------------------------------------------------------


def trained_gate(regularizer, steps=400):
    """alpha over a tiny problem after training gate and reward head with a strong lambda_G."""
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
    saturated, entropy = (TOTAL_NAMES.index(n) for n in ("saturated_tokens", "entropy"))
    assert default_out.totals[saturated] == 0 and printed_out.totals[saturated] > 48
    assert printed_out.totals[entropy] < 0.3 * default_out.totals[entropy]


# --- bad input -----------------------------------------------------------------------------------


def replaced(**changes):
    t = batch(1)
    return {**t, **{k: (v(t[k]) if callable(v) else v) for k, v in changes.items()}}


BAD = [
    ({"hidden": lambda x: x.numpy()}, TypeError, "hidden must be a tensor, got ndarray"),
    ({"hidden": lambda x: x[0]}, ValueError, r"hidden must be (R, T, d) and not empty, got (5, 3)"),
    ({"hidden": lambda x: x[:0]}, ValueError, "not empty, got (0, 5, 3)"),
    ({"hidden": lambda x: x[:, :0]}, ValueError, "not empty, got (4, 0, 3)"),
    ({"hidden": lambda x: x.long()}, TypeError, "hidden must be of a floating dtype"),
    ({"hidden": lambda x: x[..., :2]}, ValueError, "lm_weight must be (V, 2), got (6, 3)"),
    ({"labels": lambda x: x[:, :4]}, ValueError, "labels must be (4, 5), got (4, 4)"),
    ({"labels": lambda x: x.double()}, TypeError, "labels must be int64 or int32"),
    ({"mask": lambda x: x[:2]}, ValueError, "mask must be (4, 5), got (2, 5)"),
    ({"mask": lambda x: x.double()}, TypeError, "mask must be bool or an integer dtype"),
    ({"gate_logit": lambda x: x.mT}, ValueError, "gate_logit must be (4, 5), got (5, 4)"),
    ({"gate_logit": lambda x: x.float()}, TypeError, "gate_logit must be torch.float64"),
    ({"lm_weight": None}, TypeError, "lm_weight must be a tensor, got NoneType"),
    ({"lm_weight": lambda x: x[0]}, ValueError, "lm_weight must be (V, 3), got (3,)"),
    ({"lm_weight": lambda x: x.float()}, TypeError, "lm_weight must be float64 exactly where"),
    ({"lm_bias": lambda x: x[:5]}, ValueError, "lm_bias must be (6,), got (5,)"),
    ({"reward_weight": lambda x: x[:, :5]}, ValueError, "must be (6, 3) or (K, 6, 3), got (1, 5"),
    ({"reward_weight": lambda x: x[:0]}, ValueError, "at least one head, got K = 0"),
    ({"reward_bias": lambda x: x[0]}, ValueError, "reward_bias must be (1, 6), got (6,)"),
    ({"reward_bias": lambda x: x.long()}, TypeError, "reward_bias must be of a floating dtype"),
    ({"num_pairs": 3}, ValueError, "num_pairs must be in [0, 2] for 4 rows, got 3"),
    ({"num_pairs": -1}, ValueError, "num_pairs must be in [0, 2]"),
    ({"num_pairs": True}, TypeError, "num_pairs must be an int"),
    ({"objective": torch.zeros(2)}, TypeError, "objective must be int64"),
    ({"objective": torch.zeros(3).long()}, ValueError, "objective must be (2,), got (3,)"),
    ({"objective": torch.tensor([0, 1])}, ValueError, "numbers in [0, 1), got 0 ... 1"),
    ({"objective": torch.tensor([-1, 0])}, ValueError, "numbers in [0, 1), got -1 ... 0"),
    ({"objective_weights": [0.5, 0.5]}, ValueError, "objective_weights must be (1,), got (2,)"),
    ({"counts": 3}, TypeError, "counts must be LossCounts or None, got int"),
    ({"mix": "both"}, ValueError, "mix must be one of logits, probs, got 'both'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_names_argument_expected_and_got(changes, error, message):
    arguments = batch(1)
    for key, value in changes.items():
        arguments[key] = value(arguments[key]) if callable(value) else value
    with pytest.raises(error, match=re.escape(message)):
        dual_head_loss(**arguments)


@pytest.mark.parametrize("label", [-1, -100, 6, 2**31, -(2**63)])
def test_a_label_out_of_range_under_the_mask_raises(label):
    t = batch(1)
    row, column = t["mask"].nonzero()[1].tolist()
    t["labels"][row, column] = label
    expected = f"labels must be in [0, 6) where mask is set, got {label} at ({row}, {column})"
    with pytest.raises(ValueError, match=re.escape(expected)):
        dual_head_loss(**t)


def test_an_odd_number_of_rows_needs_num_pairs():
    t = batch(1, rows=5)
    with pytest.raises(ValueError, match="even number of rows"):
        dual_head_loss(**t)
    assert dual_head_loss(**t, num_pairs=2).chosen_logps.shape == (2,)
