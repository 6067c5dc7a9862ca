# SPDX-License-Identifier: Apache-2.0
"""The CUDA step with a reward head that is a correction, on the host backend, against float64.

The tests cover both paths, every format of the LM head and both copy engines. A row's bits depend
on nothing but the row.
"""

from __future__ import annotations

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import CLOSE, check_step, runner, same_bits, stream_runner

from dualhead_ext.quantization import FORMATS

BULK, PIECES = 9, 8  # compute capability: 9 has bulk copies of rows, 8 copies 16 bytes per lane
KINDS = [("embedding", 0), ("embedding", 5), ("lowrank", 0), ("lowrank", 37)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def kind(request):
    return dict(zip(("reward_head", "r"), request.param, strict=True))


@pytest.fixture
def plain(testing_module):
    return runner(testing_module)


@pytest.fixture
def stream(testing_module):
    return stream_runner(testing_module)


def close(arguments, dtype):
    """Tolerances.

    An embedding head rounds the moved hidden state to its dtype before the LM head.
    """
    rounds = arguments["reward_head"] == "embedding" and dtype != "float32"
    return {"rtol": 0, "atol": {"bfloat16": 0.12, "float16": 0.015}[dtype]} if rounds else CLOSE


def everything(rng, dtype, B, aligned, **sizes):
    """Arguments with all controls of both heads, and sampled rows."""
    options = {"d": 40, "V": 67, "K": 2, "H": 2, "d_k": 8, "S": 9, "bias": True} | sizes
    arguments = model.random_arguments(rng, dtype, B=B, aligned=aligned, **options)
    return arguments | {
        "logit_scale": 0.5,
        "logit_softcap": 20.0,
        "objective_weights": rng.standard_normal((B, options["K"])).astype(np.float32),
        "gate_offset": rng.standard_normal(B).astype(np.float32),
        "strength": rng.uniform(0.5, 1.5, B).astype(np.float32),
        "seeds": rng.integers(0, 2**62, B),
        "draws": rng.integers(0, 2**40, B),
    }


# --- the plain path ------------------------------------------------------------------------------

PLAIN_SIZES = {
    "one of each": dict(B=1, d=1, V=1, K=1, H=1, d_k=1, S=1, lengths=[0]),
    "odd": dict(B=3, d=33, V=65, K=2, H=3, d_k=5, S=11),
    "two tiles": dict(B=9, d=7, V=33, K=3, H=2, d_k=1, S=3),
    "fours": dict(B=2, d=64, V=40, H=2, d_k=4, S=4),
    "slices": dict(B=2, d=1040, V=9, H=2, d_k=3, S=4),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", PLAIN_SIZES)
def test_the_plain_step_is_the_float64_one(plain, seed, kind, dtype, size):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, dtype, **PLAIN_SIZES[size], bias=True, **kind)
    for mix_probs in (False, True):
        arguments["mix_probs"] = mix_probs
        check_step(arguments, plain(arguments, dtype, record=True, seed=seed), dtype)


def test_the_plain_step_has_the_same_bits_in_any_grid_and_batch(plain, seed, kind):
    rng = np.random.default_rng(seed)
    arguments = everything(rng, "float32", 9, False, d=33, **kind)
    whole = plain(arguments, "float32", blocks=1, threads=32)
    check_step(arguments, whole, "float32")
    for i, (blocks, threads) in enumerate([(2, 64), (5, 32), (8, 256)]):
        shape = {"blocks": blocks, "threads": threads, "dirt": (0xFF, 0, 0x5A)[i]}
        assert not same_bits(whole, plain(arguments, "float32", seed=seed + i, **shape))
    check_rows_alone(plain, arguments, "float32", whole, ([4], [8, 0]))


def check_rows_alone(run, arguments, dtype, whole, choices):
    count = len(arguments["hidden"])
    shared = {"q_weight", "k_weight", "u_weight", "lm_bias", "lm_scale"}
    shared |= {"lm_weight", "reward_bias", "reward_down", "reward_up"}
    per_row = {
        name
        for name, value in arguments.items()
        if isinstance(value, np.ndarray) and len(value) == count and name not in shared
    }
    for rows in choices:
        batch = {n: v[rows].copy() if n in per_row else v for n, v in arguments.items()}
        part = run(batch, dtype).arrays()
        for name, value in whole.arrays().items():
            for i, row in enumerate(rows) if value is not None else ():
                assert part[name][i].tobytes() == value[row].tobytes(), (name, rows, row)


# --- the streaming path --------------------------------------------------------------------------

# An embedding head has two rows per request, so that a batch tile of 8 rows holds 4 requests
STREAM_SIZES = {
    "least": dict(B=1, d=8, V=1, H=1, d_k=1, S=1, lengths=[0]),
    "two units": dict(B=1, d=8, V=9),
    "one row": dict(B=1, d=1000, V=301, d_k=3),
    "odd": dict(B=3, d=136, V=65, K=2),
    "five": dict(B=5, d=128, V=64),
    "two tiles": dict(B=9, d=72, V=150, K=3),
    "four tiles": dict(B=17, d=264, V=33, K=4),
    "eight tiles": dict(B=33, d=200, V=131),
    "twice": dict(B=70, d=40, V=20),
}


def aligned(rng, dtype, **sizes):
    options = {"B": 2, "d": 40, "V": 37, "H": 2, "d_k": 8, "S": 5, "bias": True} | sizes
    return model.random_arguments(rng, dtype, aligned=True, **options)


@pytest.mark.quick_cases(48)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", STREAM_SIZES)
@pytest.mark.parametrize("engine", [BULK, PIECES], ids=["bulk", "pieces"])
def test_the_streamed_step_is_the_float64_one(stream, seed, kind, dtype, size, engine):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, dtype, **STREAM_SIZES[size], **kind)
    for mix_probs in (False, True):
        arguments["mix_probs"] = mix_probs
        step = stream(arguments, dtype, record=True, compute_major=engine, seed=seed + mix_probs)
        check_step(arguments, step, dtype, close(arguments, dtype))


@pytest.mark.quick_cases(36)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("B", [1, 9, 40])
def test_a_quantised_lm_head(stream, seed, kind, name, dtype, B):
    rng = np.random.default_rng(seed)
    d = 256 if name == "int4" else 272
    arguments = aligned(rng, dtype, B=B, d=d, V=83, K=2, **kind)
    arguments = model.quantized(rng, arguments, name, apart=16) | {"mix_probs": bool(seed % 2)}
    engine = (BULK, PIECES)[seed % 2]
    step = stream(arguments, dtype, compute_major=engine, seed=seed)
    check_step(arguments, step, dtype, close(arguments, dtype))


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("gate", ["attention", "given"])
@pytest.mark.parametrize("engine", [BULK, PIECES], ids=["bulk", "pieces"])
def test_bits_depend_neither_on_device_grid_and_schedule_nor_on_the_batch(
    stream, seed, kind, engine, gate
):
    rng = np.random.default_rng(seed)
    arguments = everything(rng, "bfloat16", 40, True, d=584, V=150, gate=gate, **kind)
    arguments["alpha"] = np.tile(np.float32([0, 0.25, 1, 2.5]), 10)
    del arguments["gate_offset"]
    first = stream(arguments, "bfloat16", seed=seed)
    check_step(arguments, first, "bfloat16", close(arguments, "bfloat16"))
    for i, (kib, blocks) in enumerate([(227, 1), (163, 3), (99, 4)]):
        device = {"compute_major": engine, "shared_kib": kib, "blocks": blocks}
        again = stream(arguments, "bfloat16", dirt=(0xFF, 0, 0x5A)[i], seed=2 * seed + i, **device)
        assert not same_bits(first, again), device
    check_rows_alone(stream, arguments, "bfloat16", first, ([0], [39], [6, 5, 1], list(range(17))))


def test_alpha_0_is_the_plain_lm_head(stream, plain, seed, kind):
    """The logits are those of a full head at strength 0, bit for bit, whatever the correction
    holds.
    """
    rng = np.random.default_rng(seed)
    for run, dtype, rows in ((stream, "bfloat16", True), (plain, "float32", False)):
        arguments = everything(rng, dtype, 3, rows, gate="given", **kind)
        full = everything(rng, dtype, 3, rows, gate="given")
        full |= {n: v for n, v in arguments.items() if not n.startswith(("reward", "objective"))}
        zero = {"strength": np.zeros(3, np.float32)}
        nan = {n: v for n, v in arguments.items() if n in ("reward_down", "reward_up")}
        nan = {n: model.narrow(np.full(v.shape, np.nan), dtype) for n, v in nan.items()}
        got, expected = run(arguments | nan | zero, dtype), run(full | zero, dtype)
        assert not same_bits(got, expected, but=("gate_logit",)), dtype


def test_one_matrix_is_read_once(testing_module, stream, seed, kind):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=4, d=512, V=512, gate="given", **kind)
    stream(arguments, "bfloat16", compute_major=BULK, blocks=1)
    # Hidden states stay in shared memory and are not copied again
    assert testing_module.bytes_copied() == 512 * 512 * 2


def differs(stream, arguments, **bug):
    """Whether a skipped barrier changes a result or raises an error, under any of 8 schedules."""
    right = stream(arguments, "bfloat16")
    for schedule in range(8):
        try:
            if same_bits(right, stream(arguments, "bfloat16", seed=schedule, **bug)):
                return True
        except RuntimeError as error:
            assert "deadlock" in str(error) or "diverged" in str(error) or "fence" in str(error)
            return True
    return False


@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_a_missing_grid_barrier_is_seen(stream, seed, barrier):
    """One is before D h is read, one before the rows that are computed from it, and one before the
    products of what has been loaded into shared memory.
    """
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", reward_head="embedding", r=5, d=520, V=70)
    assert differs(stream, arguments, skipped_grid_barrier=barrier)
