# SPDX-License-Identifier: Apache-2.0
"""One decode step in float64 NumPy, a row at a time, and random arguments for it.

The bare kernels are compared with it. It shares no code with the package.

Arguments are a dict with the names of ``dualhead::decode_step``. bfloat16 and float16 arrays hold
uint16 bit patterns, as the kernels take them. Dimensions: B batch, d hidden, V vocabulary, K
objectives, H gate heads, d_k their size, g = H d_k, S cache columns.
"""

from __future__ import annotations

import math

import numpy as np
from numpy_model import log_softmax, philox_word, post, sigmoid, softmax

STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}


# --- storage dtypes ------------------------------------------------------------------------------


def narrow(values, dtype):
    """Round to nearest even, and store."""
    values = np.asarray(values, dtype=np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values


def widen(stored, dtype):
    """Stored values as float64, exactly."""
    if dtype == "float16":
        stored = stored.view(np.float16)
    elif dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN warns
        return stored.astype(np.float64)


def spacing(values, dtype):
    """The distance to the next representable value."""
    digits = {"float32": 23, "bfloat16": 7, "float16": 10}[dtype]
    smallest = -14 if dtype == "float16" else -126
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**smallest)))
    return 2.0 ** (np.maximum(exponent, smallest) - digits)


def _e4m3(bits):
    exponent, fraction = bits >> 3 & 15, bits & 7
    magnitude = 2.0 ** (exponent - 10) * (8 + fraction) if exponent else fraction * 2.0**-9
    return -magnitude if bits & 128 else magnitude


E4M3 = np.array([_e4m3(bits) for bits in range(256)])  # 127 and 255 are NaN and do not occur


# --- the step ------------------------------------------------------------------------------------


def append(arguments, dtype, b):
    """The contents of row b's new column: (k (g,), u (H,), valid), or None if the cache is full."""
    length, capacity = arguments["cache_length"][b], arguments["cache_k"].shape[2]
    if not 0 <= length < capacity:
        return None
    hidden = widen(arguments["hidden"][b], dtype)
    k = widen(arguments["k_weight"], dtype) @ hidden
    u = arguments["u_weight"].astype(np.float64) @ hidden
    return k, u, bool(arguments.get("new_valid", np.ones(b + 1, bool))[b])


def attend(arguments, dtype, b, columns):
    """The gate's logit before its offset, and attention rows (H, S), over the first `columns`."""
    cache_k = widen(arguments["cache_k"][b], dtype)
    heads, capacity, head_size = cache_k.shape
    q = (widen(arguments["q_weight"], dtype) @ widen(arguments["hidden"][b], dtype)).reshape(
        heads, head_size
    )
    logit, attention = float(arguments["gate_bias"][0]), np.zeros((heads, capacity))
    seen = np.flatnonzero(arguments["cache_valid"][b][:columns])
    for h in range(heads if len(seen) else 0):
        p = softmax(cache_k[h, seen] @ q[h] / math.sqrt(head_size))
        attention[h, seen] = p
        logit += p @ arguments["cache_u"][b, h, seen].astype(np.float64)
    return logit, attention


def mixing_weight(arguments, b, gate_logit):
    weight = controlled_weight(arguments, b, gate_logit)
    threshold = float(arguments["skip_threshold"][b]) if "skip_threshold" in arguments else 0.0
    return 0.0 if weight < threshold else 1.0 if abs(1 - weight) < threshold else weight


def controlled_weight(arguments, b, gate_logit):
    alpha = float(arguments["alpha"][b]) if "alpha" in arguments else sigmoid(gate_logit)
    if "strength" not in arguments:
        return alpha
    strength = float(arguments["strength"][b])
    highest = 1.0 if arguments.get("mix_probs") else math.inf
    return 0.0 if strength == 0 else min(max(strength * alpha, 0.0), highest)


def head_weight(arguments, name, dtype):
    """(..., V, d) of "lm" or "reward". The formats are defined in dualhead_ext/quantization/."""
    stored = arguments[f"{name}_weight"]
    if "format" not in arguments:
        return widen(stored, dtype)
    scale = arguments[f"{name}_scale"].astype(np.float64)[..., None]
    if arguments["format"] == "int8":
        return stored.astype(np.float64) * scale
    if arguments["format"] == "fp8":
        return E4M3[stored] * scale
    halves = stored.reshape(*stored.shape[:-1], -1, 64).astype(np.float64)
    q = np.concatenate([halves % 16, halves // 16], -1) - 8
    return (q * scale).reshape(*stored.shape[:-1], -1)


def corrections(arguments, dtype, hidden):
    """(K, V): each objective's delta."""
    change = widen(arguments["reward_bias"], dtype)
    if "reward_down" in arguments:
        inner = widen(arguments["reward_down"], dtype) @ hidden
        change = change + np.einsum("knr,kr->kn", widen(arguments["reward_up"], dtype), inner)
    if arguments["reward_head"] == "lowrank":
        return change
    # The streaming path rounds the change to the dtype of hidden states first.
    return change @ head_weight(arguments, "lm", dtype).T


def row_logits(arguments, dtype, b, alpha):
    """(V,): mixed logits, or log-probabilities with mix_probs."""
    hidden = widen(arguments["hidden"][b], dtype)
    lm = head_weight(arguments, "lm", dtype) @ hidden
    if "lm_bias" in arguments:
        lm = lm + widen(arguments["lm_bias"], dtype)
    if "reward_weight" in arguments:
        rewards = head_weight(arguments, "reward", dtype) @ hidden
        if "reward_bias" in arguments:
            rewards = rewards + widen(arguments["reward_bias"], dtype)
    else:
        rewards = lm + corrections(arguments, dtype, hidden)
    count = len(rewards)
    weights = arguments.get("objective_weights", np.full((b + 1, count), 1 / count))[b]
    weights = weights.astype(np.float64)
    reward = weights @ rewards
    if "reward_weight" not in arguments:
        # z_LM counts once, whatever the sum of the weights is
        reward = reward + (1 - weights.sum()) * lm
    scale, cap = arguments["logit_scale"], arguments["logit_softcap"]
    if alpha == 0 or alpha == 1:
        z = post(reward if alpha else lm, scale, cap)
        return log_softmax(z) if arguments["mix_probs"] else z
    if not arguments["mix_probs"]:
        return post((1 - alpha) * lm + alpha * reward, scale, cap)
    return np.logaddexp(
        math.log1p(-alpha) + log_softmax(post(lm, scale, cap)),
        math.log(alpha) + log_softmax(post(reward, scale, cap)),
    )


def race(arguments, b, logits, draw):
    """Scores (V,) of row b for the given fp32 logits. The largest one wins; -inf where filtered."""

    def own(name, default):
        return arguments[name][b] if name in arguments else default

    temperature = np.float32(own("temperature", 1.0))
    if not temperature > 0:
        return logits.astype(np.float64)
    # As in the kernels: ranks follow the rounded values
    x = (logits / temperature).astype(np.float32)
    order = np.argsort(-x.astype(np.float64), kind="stable")
    top_k, top_p, min_p = own("top_k", 0), own("top_p", 1.0), own("min_p", 0.0)
    kept = order[:top_k] if top_k > 0 else order
    if top_p < 1:
        p = softmax(x[kept].astype(np.float64))
        above = np.concatenate([[0.0], np.cumsum(p)[:-1]])
        kept = kept[: max(1, int((above < float(top_p)).sum()))]
    if min_p > 0:
        floor = float(x[order[0]]) + math.log(float(min_p))
        kept = [v for v in kept if v == order[0] or float(x[v]) >= floor]
    raced = np.full(len(x), -np.inf)
    for v in kept:
        word = philox_word(int(arguments["seeds"][b]), int(draw), int(v))
        uniform = min((word + 0.5) * 2.0**-32, 1 - 2.0**-24)
        raced[v] = float(x[v]) - math.log(-math.log1p(-uniform))
    return raced


# --- random arguments ----------------------------------------------------------------------------


def slack(values, rows=0, columns=0):
    """The same values as a view, with NaN, or its bit pattern, between rows and after them."""
    shape = (*values.shape[:-2], values.shape[-2] + rows, values.shape[-1] + columns)
    filler = np.nan if values.dtype == np.float32 else 0x7FFF
    padded = np.full(shape, filler, dtype=values.dtype)
    view = padded[..., : values.shape[-2], : values.shape[-1]]
    view[...] = values
    return view


def random_cache(rng, dtype, batch, heads, head_size, capacity, lengths):
    """A cache filled up to `lengths`, with NaN beyond the length and in columns that are not valid.

    Nothing may read them.
    """
    k = rng.standard_normal((batch, heads, capacity, head_size))
    u = rng.standard_normal((batch, heads, capacity)).astype(np.float32)
    lengths = np.asarray(lengths, dtype=np.int32)
    valid = rng.random((batch, capacity)) < 0.8
    hidden = ~(valid & (np.arange(capacity) < lengths[:, None]))
    k[np.broadcast_to(hidden[:, None], u.shape)] = np.nan
    u[np.broadcast_to(hidden[:, None], u.shape)] = np.nan
    return {"cache_k": narrow(k, dtype), "cache_u": u, "cache_valid": valid} | {
        "cache_length": lengths
    }


def random_reward_head(rng, dtype, K, V, d, reward_head, r, columns):
    def normal(*shape, scale):
        return narrow(rng.standard_normal(shape) * scale, dtype)

    scale = 2.0 / math.sqrt(d)
    if reward_head == "full":
        return {"reward_weight": slack(normal(K, V, d, scale=scale), 2, columns=columns)}
    n = d if reward_head == "embedding" else V
    arguments = {"reward_head": reward_head, "reward_bias": normal(K, n, scale=0.5)}
    if r:
        arguments["reward_down"] = normal(K, r, d, scale=scale)
        arguments["reward_up"] = normal(K, n, r, scale=0.5 / math.sqrt(r))
    return arguments


def random_arguments(
    rng, dtype, *, B=2, d=13, V=37, K=1, H=2, d_k=3, S=9, lengths=None, gate="attention",
    bias=False, aligned=False, reward_head="full", r=3
):  # fmt: skip
    """Arguments without controls or sampling. hidden and the heads are strided.

    aligned: rows start at multiples of 16 bytes, which the streaming path needs.
    r: the rank of a correction.
    """

    def normal(*shape, scale=1.0):
        return narrow(rng.standard_normal(shape) * scale, dtype)

    weight_scale = 2.0 / math.sqrt(d)
    arguments = {
        "hidden": slack(normal(B, d), columns=8 if aligned else 3),
        "lm_weight": slack(normal(V, d, scale=weight_scale), columns=16 if aligned else 5),
        **random_reward_head(rng, dtype, K, V, d, reward_head, r, 8 if aligned else 1),
        "mix_probs": False,
        "logit_scale": 1.0,
        "logit_softcap": 0.0,
    }
    if bias:
        arguments["lm_bias"] = normal(V)
        if reward_head == "full":
            arguments["reward_bias"] = normal(K, V)
    if gate == "given":
        return arguments | {"gate_logit": rng.standard_normal(B).astype(np.float32)}
    if lengths is None:
        lengths = rng.integers(0, S, B)
    return (
        arguments
        | {
            "q_weight": normal(H * d_k, d, scale=weight_scale),
            "k_weight": normal(H * d_k, d, scale=weight_scale),
            "u_weight": (rng.standard_normal((H, d)) * weight_scale).astype(np.float32),
            "gate_bias": rng.standard_normal(1).astype(np.float32),
        }
        | random_cache(rng, dtype, B, H, d_k, S, lengths)
    )


def quantized(rng, arguments, name, apart=0):
    """The arguments with random heads in a quantised format. Every value of the format occurs.

    apart: elements between the rows of the heads.
    """
    V, d = arguments["lm_weight"].shape
    shapes = {"lm": (V,)}
    if "reward_weight" in arguments:
        shapes["reward"] = (len(arguments["reward_weight"]), V)
    columns, groups = (d // 2, (d // 128,)) if name == "int4" else (d, ())
    size = {"int8": 73.0, "fp8": 180.0, "int4": 4.6}[name] * math.sqrt(d)
    heads = {"format": name}
    for head, shape in shapes.items():
        stored = rng.integers(0, 256, (*shape, columns)).astype(np.uint8)
        if name == "int8":
            stored = stored.view(np.int8)
        if name == "fp8":
            stored[stored & 127 == 127] = 1
        padded = np.zeros((*shape, columns + apart), stored.dtype)
        padded[..., :columns] = stored
        heads[f"{head}_weight"] = padded[..., :columns]
        scale = rng.uniform(0.5, 2, (*shape, *groups)) / size
        heads[f"{head}_scale"] = scale.astype(np.float32)
    return arguments | heads
