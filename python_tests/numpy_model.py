# SPDX-License-Identifier: Apache-2.0
"""The paper's formulas in float64 NumPy, position by position and row by row.

The reference is compared with them. They share no code with the package, and need not be fast.
"""

import math

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def gate_logits(hidden, mask, weights, num_heads):
    """(T, d) of one row, mask (T,) -> (T,).

    Causal multi-head attention, the output projection, w_g and b_g.
    """
    wq, wk, wv, wo, wg, bg = weights
    size = wq.shape[0] // num_heads
    logits = []
    for t in range(len(hidden)):
        seen = [s for s in range(t + 1) if mask[s]]
        context = np.zeros(wq.shape[0])
        for i in range(num_heads):
            rows = slice(i * size, (i + 1) * size)
            if not seen:
                continue
            q = wq[rows] @ hidden[t]
            scores = np.array([q @ (wk[rows] @ hidden[s]) for s in seen]) / math.sqrt(size)
            p = softmax(scores)
            context[rows] = sum(p[n] * (wv[rows] @ hidden[s]) for n, s in enumerate(seen))
        logits.append(float(wg @ (wo @ context)) + bg)
    return np.array(logits)


def post(z, scale, cap):
    z = z * scale
    return cap * np.tanh(z / cap) if cap else z


def mixture(z_lm, z_rm, alpha, mix, scale, cap):
    """(V,), (V,), a number -> logits, or log-probabilities if mix is "probs"."""
    if mix == "logits":
        return post((1 - alpha) * z_lm + alpha * z_rm, scale, cap)
    p = (1 - alpha) * softmax(post(z_lm, scale, cap)) + alpha * softmax(post(z_rm, scale, cap))
    return np.log(p)


def log_softmax(z):
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


def philox_word(seed, draw, index):
    """Word ``index mod 4`` of Philox4x32-10 in plain Python integers."""
    mask = 0xFFFFFFFF
    seed, draw = seed & (2**64 - 1), draw & (2**64 - 1)
    c = [index // 4, 0, draw & mask, draw >> 32]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[index % 4]


def filtered_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """softmax(logits / temperature) after top-k, top-p and min-p, renormalised.

    Written as a loop over ranks.
    """
    x = np.asarray(logits, dtype=np.float64) / temperature
    order = sorted(range(len(x)), key=lambda v: (-x[v], v))
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        p = softmax(x[order])
        kept, mass = [], 0.0
        for v, share in zip(order, p, strict=True):
            if kept and mass >= top_p:
                break
            kept.append(v)
            mass += share
        order = kept
    if min_p > 0.0:
        p = softmax(x[order])
        order = [v for v, share in zip(order, p, strict=True) if share >= min_p * p.max()]
    probabilities = np.zeros(len(x))
    probabilities[order] = softmax(x[order])
    return probabilities
