# SPDX-License-Identifier: Apache-2.0
"""The terms of the objective: entropy from the logit, reductions, options, counts, metrics."""

import math

import numpy as np
import pytest
import torch

from dualhead_ext.loss import terms as losses
from dualhead_ext.loss.pairs import Pairing
from dualhead_ext.loss.terms import LossCounts, LossOptions, gate_entropy


def test_gate_entropy_is_the_formula_and_its_gradient_at_any_logit():
    logits = np.concatenate((np.linspace(-60, 60, 481), [-700.0, 700.0, 1e-9]))
    x = torch.tensor(logits, requires_grad=True)
    entropy = gate_entropy(x)
    (gradient,) = torch.autograd.grad(entropy.sum(), x)
    for i, logit in enumerate(logits):
        # The smaller one of a and 1 - a, without cancellation. Both logarithms use log(1 + e^-|l|).
        small = math.exp(-abs(logit)) / (1 + math.exp(-abs(logit)))
        softplus = math.log1p(math.exp(-abs(logit)))
        expected = (1 - small) * softplus + small * (abs(logit) + softplus)
        assert entropy[i].item() == pytest.approx(expected, rel=1e-13, abs=1e-300)
        slope = -logit * small * (1 - small)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-9, abs=1e-16 * small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_entropy_of_a_fixed_alpha_is_zero_without_gradient(dtype):
    x = torch.tensor([-math.inf, math.inf, 0.0], dtype=dtype, requires_grad=True)
    entropy = gate_entropy(x)
    (gradient,) = torch.autograd.grad(entropy.sum(), x)
    assert entropy.tolist() == pytest.approx([0.0, 0.0, math.log(2)])
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def test_gate_entropy_keeps_nan_visible():
    assert torch.isnan(gate_entropy(torch.tensor([math.nan]))).all()


def test_gate_gradient_survives_in_fp32_where_alpha_rounds_to_one():
    x = torch.tensor([40.0, -40.0, 80.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(gate_entropy(x).sum(), x)
    assert torch.sigmoid(x)[0] == 1.0
    expected = [-40 * math.exp(-40), 40 * math.exp(-40), -80 * math.exp(-80)]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5)


def test_regularizers_by_name():
    entropy = torch.tensor(0.5)
    values = {name: float(f(entropy)) for name, f in losses.GATE_REGULARIZERS.items()}
    assert values == {"entropy": -0.5, "entropy_as_printed": 0.5, "none": 0.0}


def test_the_printed_formula_is_plus_the_entropy():
    for logit in (-3.0, 0.0, 0.7, 5.0):
        a = 1 / (1 + math.exp(-logit))
        printed = -(a * math.log(a) + (1 - a) * math.log(1 - a))
        entropy = gate_entropy(torch.tensor(logit, dtype=torch.float64))
        assert float(losses.minimize_entropy(entropy)) == pytest.approx(printed, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_pair_loss(smoothing):
    margins = torch.tensor([-900.0, -2.0, 0.0, 3.0, 900.0], dtype=torch.float64)
    for margin, got in zip(
        margins.tolist(), losses.pair_loss(margins, smoothing).tolist(), strict=True
    ):
        # -log sigmoid(m) = log(1 + e^-m)
        right, wrong = np.logaddexp(0, -margin), np.logaddexp(0, margin)
        assert got == pytest.approx((1 - smoothing) * right + smoothing * wrong, rel=1e-12)


def test_pair_reductions():
    logps, lengths = torch.tensor([-6.0, 0.0]), torch.tensor([3, 0])
    assert losses.PREFERENCE_REDUCTIONS["sum"](logps, lengths).tolist() == [-6.0, 0.0]
    assert losses.PREFERENCE_REDUCTIONS["mean"](logps, lengths).tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("mix", "logit", ValueError),
        ("gate_regularizer", "l2", ValueError),
        ("lm_reduction", None, ValueError),
        ("pref_on", "lm", ValueError),
        ("pref_reduction", "max", ValueError),
        ("beta_r", 0.0, ValueError),
        ("beta_r", -1.0, ValueError),
        ("beta_r", "0.1", TypeError),
        ("lambda_r", -0.1, ValueError),
        ("lambda_g", math.nan, ValueError),
        ("lambda_g", True, TypeError),
        ("gamma", math.inf, ValueError),
        ("reward_l2", -1.0, ValueError),
        ("reward_l2", "100", TypeError),
        ("reward_l2", 1.0, ValueError),  # with the default preference, log_prob
        ("label_smoothing", 0.5, ValueError),
        ("logit_scale", 0, ValueError),
        ("logit_softcap", -1, ValueError),
        ("lm_on_chosen", 1, TypeError),
    ],
)
def test_options_name_what_is_wrong(name, value, error):
    with pytest.raises(error, match=f"{name} must be .*got "):
        LossOptions(**{name: value})


def test_counts_of_a_batch_and_their_sum():
    def numbers(counts):
        return tuple(
            int(x) for x in (counts.sequences, counts.lm_tokens, counts.pairs, counts.tokens)
        )

    lengths = torch.tensor([2, 1, 0, 3, 1])
    pairing = Pairing(5, [(0, 2), (1, 3)])
    counts = LossCounts.of_lengths(lengths, pairing)
    assert numbers(counts) == (3, 4, 2, 7)
    without = LossCounts.of_lengths(lengths, pairing, lm_on_chosen=False)
    assert numbers(without) == (1, 1, 2, 7)
    assert numbers(counts + without) == (4, 5, 4, 14)
    assert numbers(LossCounts.of_lengths(lengths[:4])) == (2, 3, 2, 6)


def totals_of(**values):
    return torch.tensor([values.get(name, 0.0) for name in losses.TOTAL_NAMES]).double()


def test_metrics_of_totals():
    totals = totals_of(
        sequences=4,
        lm_tokens=8,
        pairs=4,
        tokens=20,
        lm_nll=16.0,
        pair_loss=2.0,
        chosen_logps=-40.0,
        rejected_logps=-48.0,
        chosen_rewards=-4.0,
        rejected_rewards=-4.8,
        correct_pairs=3,
        saturated_pairs=1,
        alpha=5.0,
        alpha_squared=2.0,
        entropy=10.0,
        alpha_near_0=2,
        alpha_near_1=1,
        alpha_bin_0=15,
        alpha_bin_9=5,
    )
    metrics = losses.metrics_of_totals(totals, LossOptions(lambda_r=2.0, lambda_g=0.1))
    assert metrics == pytest.approx(
        {
            "loss": 4.0 + 2 * 0.5 - 0.1 * 0.5,
            "lm_loss": 4.0,
            "preference_loss": 0.5,
            "gate_loss": -0.05,
            "rewards/chosen": -1.0,
            "rewards/rejected": -1.2,
            "rewards/margins": 0.2,
            "rewards/accuracies": 0.75,
            "logps/chosen": -10.0,
            "logps/rejected": -12.0,
            "preference/saturation": 0.25,
            "gate/mean": 0.25,
            "gate/std": math.sqrt(0.1 - 0.0625),
            "gate/entropy": 0.5,
            "gate/below_0.01": 0.1,
            "gate/above_0.99": 0.05,
            "gate/saturation": 0.15,
            **{f"gate/histogram/0.{i}-0.{i + 1}": 0.0 for i in range(1, 9)},
            "gate/histogram/0.0-0.1": 0.75,
            "gate/histogram/0.9-1.0": 0.25,
        }
    )
    assert losses.metrics_of_totals(totals, LossOptions(lm_reduction="mean"))["lm_loss"] == 2.0


def test_metrics_leave_out_what_was_not_counted():
    assert losses.metrics_of_totals(totals_of(), LossOptions()) == {"loss": 0.0}
    pairs_only = losses.metrics_of_totals(totals_of(pairs=1, pair_loss=1.0), LossOptions())
    assert "lm_loss" not in pairs_only and "gate/mean" not in pairs_only
