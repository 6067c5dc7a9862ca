# SPDX-License-Identifier: Apache-2.0
"""Problems for the training objective, and its formula in float64 NumPy, token by token."""

import math

import numpy as np
import numpy_model as npm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualhead_ext import reference

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


class Products(TorchDispatchMode):
    """The matrix products that run: (dtype, rows of the first factor, address
    of the second, result's shape)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm_"):
            first, second = args[-2:]
            self.seen.append((first.dtype, first.shape[0], second.data_ptr(), result.shape))
        return result
