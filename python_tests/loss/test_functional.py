# SPDX-License-Identifier: Apache-2.0
"""dual_head_loss as a function: dtypes, autocast, autograd, strides, invalid arguments."""

import re

import pytest
import torch
from loss_cases import Products, batch

from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss import products as loss_products


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
    # With bf16, products are rounded to 8 bits of mantissa, at logits of about 10. Otherwise they
    # are not rounded.
    loose = autocast or torch.bfloat16 in (lm, reward)
    tolerance = 5e-2 if loose else 2e-5
    torch.testing.assert_close(out.loss.double(), wanted.loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pays", [True, False], ids=["bf16 faster", "fp32 faster"])
def test_autocast_runs_the_products_in_bf16_where_that_pays(pays, monkeypatch):
    monkeypatch.setattr(loss_products, "narrow_pays", lambda device, dtype: pays)
    t = batch(14, rows=4, d=8, dtype=torch.float32)
    t["reward_weight"].requires_grad_()
    with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        dual_head_loss(**t).loss.backward()
    expected = torch.bfloat16 if pays else torch.float32
    assert products.seen and {dtype for dtype, *_ in products.seen} == {expected}


def test_the_lm_head_works_for_chosen_responses_alone():
    """z_LM is computed only for the language model term, and only for its tokens."""
    t = batch(15, rows=6, length=7, bias=False)
    with Products() as products:
        dual_head_loss(**t)
    rows = {name: 0 for name in ("lm_weight", "reward_weight")}
    for _, count, factor, _ in products.seen:
        rows[next(name for name in rows if t[name].data_ptr() == factor)] += count
    chosen, rejected = int(t["mask"][:3].sum()), int(t["mask"][3:].sum())
    assert rows == {"lm_weight": chosen, "reward_weight": chosen + rejected}


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


# --- invalid arguments ---------------------------------------------------------------------------


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
    ({"lm_weight": lambda x: x.float()}, TypeError, "lm_weight must be float64 if and only if"),
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
