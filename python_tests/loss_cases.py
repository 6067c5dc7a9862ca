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
    "token_reward": {"preference": "token_reward", "beta_r": 0.7},
    "token_reward_alone": {
        "preference": "token_reward",
        "pref_gate": 1,
        "pref_reduction": "mean",
        "lm_on_chosen": False,
    },
    "l2": {"preference": "token_reward", "reward_l2": 2.0},
    "l2_gate": {
        "preference": "token_reward",
        "pref_gate": 1,
        "reward_l2": 0.6,
        "lm_on_chosen": False,
    },
    "kl": {"kl_price": 0.7},
    "kl_probs": {"kl_price": 1.3, "mix": "probs", "pref_on": "mixed"},
    "kl_post": {
        "preference": "token_reward",
        "pref_gate": 1,
        "kl_price": 0.5,
        "logit_scale": 0.5,
        "logit_softcap": 3.0,
        "lm_on_chosen": False,
    },
}
DIFFERENTIABLE = (
    *("hidden", "gate_logit", "lm_weight", "lm_bias"),
    *("reward_weight", "reward_down", "reward_up", "reward_bias"),
)
REWARD_HEADS = {"full": 0, "embedding": 2, "embedding, rank 0": 0, "lowrank": 2}


def batch(
    seed,
    rows=4,
    length=5,
    d=3,
    vocab=6,
    objectives=1,
    bias=True,
    dtype=torch.float64,
    head="full",
):
    """Arguments of a random problem. Some responses are empty, and some fill the row.

    head: a name in `REWARD_HEADS`.
    """
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
    }
    kind, rank = head.split(",")[0], REWARD_HEADS[head]
    if kind == "full":
        tensors["reward_weight"] = normal(objectives, vocab, d)
    if bias:
        tensors["lm_bias"] = normal(vocab)
    if kind != "full":
        width = d if kind == "embedding" else vocab
        tensors |= {"reward_head": kind, "reward_bias": normal(objectives, width)}
        if rank:
            tensors["reward_down"] = normal(objectives, rank, d)
            tensors["reward_up"] = normal(objectives, width, rank)
    elif bias:
        tensors["reward_bias"] = normal(objectives, vocab)
    return tensors


def ranked(seed, rows, objectives=1):
    """pairs and objective of a batch of ranked lists. A row may be in several pairs or in none."""
    g = torch.Generator().manual_seed(seed)
    pairs = [
        (a, b)
        for start in range(0, rows, 4)
        for a in range(start, min(start + 4, rows))
        for b in range(start, min(start + 4, rows))
        if a != b and torch.rand((), generator=g) < 0.3
    ]
    return {
        "pairs": torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        "objective": torch.randint(0, objectives, (len(pairs),), generator=g),
    }


def numpy_heads(a, h):
    """z_LM, and z of each objective's head."""
    z_lm = a["lm_weight"] @ h + a.get("lm_bias", 0)
    kind, bias = a.get("reward_head", "full"), a.get("reward_bias")
    if kind == "full":
        return z_lm, [
            w @ h + (0 if bias is None else bias[k]) for k, w in enumerate(a["reward_weight"])
        ]
    found = []
    for k in range(len(bias)):
        change = bias[k]
        if "reward_down" in a:
            change = a["reward_up"][k] @ (a["reward_down"][k] @ h) + change
        found.append(z_lm + (a["lm_weight"] @ change if kind == "embedding" else change))
    return z_lm, found


def numpy_loss(
    t,
    num_pairs=None,
    objective=None,
    objective_weights=None,
    pairs=None,
    mix="logits",
    beta_r=0.1,
    lambda_r=1.0,
    lambda_g=0.01,
    kl_price=0.0,
    reward_l2=0.0,
    preference="log_prob",
    pref_gate=0,
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
    """The objective token by token: (loss, lm, pref, gate, kl, l2, chosen sums, rejected sums)."""
    a = {k: v if isinstance(v, str) else v.numpy() for k, v in t.items()}
    rows, length = a["mask"].shape
    heads = len(a["reward_weight"] if "reward_weight" in a else a["reward_bias"])
    shares = np.full(heads, 1 / heads) if objective_weights is None else objective_weights.numpy()
    one = objective_weights is None and heads == 1
    pairs = [(p, num_pairs + p) for p in range(num_pairs)] if pairs is None else pairs.tolist()
    objective = [0] * len(pairs) if objective is None else objective.tolist()
    better, worse = {b for b, _ in pairs}, {w for _, w in pairs}

    def post(z):
        return npm.post(z, logit_scale, logit_softcap)

    def mixture(z_lm, z_rm, alpha):
        z = npm.mixture(z_lm, z_rm, alpha, mix, logit_scale, logit_softcap)
        return npm.log_softmax(z) if mix == "logits" else z

    sums, lengths = np.zeros((rows, heads)), np.zeros(rows, dtype=int)
    lm_total, lm_tokens, sequences, entropies, kls, squares = 0.0, 0, 0, [], [], []
    for r in range(rows):
        in_lm = r not in worse and (lm_on_chosen or r not in better)
        sequences += in_lm
        for s in range(length):
            if not a["mask"][r, s]:
                continue
            h, y = a["hidden"][r, s], a["labels"][r, s]
            alpha = npm.sigmoid(a["gate_logit"][r, s])
            z_lm, z_heads = numpy_heads(a, h)
            if a.get("reward_head", "full") == "full":
                z_rm = sum(w * z for w, z in zip(shares, z_heads, strict=True))
            else:
                z_rm = z_lm + sum(w * (z - z_lm) for w, z in zip(shares, z_heads, strict=True))
            entropies.append(-alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha))
            p, q = mixture(z_lm, z_rm, alpha), npm.log_softmax(post(z_lm))
            kls.append(float(np.exp(p) @ (p - q)))
            lengths[r] += 1
            for k, z in enumerate(z_heads):
                if preference == "token_reward":
                    reward = alpha**pref_gate * (z - z_lm)[y]
                    sums[r, k] += reward
                    squares.append((z - z_lm)[y] ** 2)
                elif pref_on == "reward":
                    sums[r, k] += npm.log_softmax(post(z))[y]
                else:
                    sums[r, k] += mixture(z_lm, z_rm if one else z, alpha)[y]
            if in_lm:
                lm_total -= p[y]
                lm_tokens += 1
    lm = lm_total / max(1, sequences if lm_reduction == "sum" else lm_tokens)
    pref, compared = 0.0, []
    for (b, w), k in zip(pairs, objective, strict=True):
        chosen, rejected = sums[b, k], sums[w, k]
        compared.append((chosen, rejected))
        if lengths[b] + lengths[w] == 0:
            continue
        if pref_reduction == "mean":
            chosen, rejected = chosen / max(1, lengths[b]), rejected / max(1, lengths[w])
        m = beta_r * (chosen - rejected) - gamma
        right, wrong = np.logaddexp(0, -m), np.logaddexp(0, m)
        pref += (1 - label_smoothing) * right + label_smoothing * wrong
    pref /= max(1, len(pairs))
    sign = {"entropy": -1.0, "entropy_as_printed": 1.0, "none": 0.0}[gate_regularizer]
    gate = lambda_g * sign * (sum(entropies) / max(1, len(entropies)))
    kl = kl_price * sum(kls) / max(1, len(kls))
    l2 = reward_l2 / 2 * sum(squares) / max(1, len(kls))
    total = lm + lambda_r * pref + gate + kl + l2
    chosen, rejected = np.array(compared).reshape(-1, 2).T
    return total, lm, pref, gate, kl, l2, chosen, rejected


class Products(TorchDispatchMode):
    """Records the products of matrices that run.

    Each entry is (dtype, rows of the first factor, address of the second, result's shape).
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm_"):
            first, second = args[-2:]
            self.seen.append((first.dtype, first.shape[0], second.data_ptr(), result.shape))
        return result
