# SPDX-License-Identifier: Apache-2.0
"""The CUDA decode kernel, compiled from the same source for the host backend, against NumPy.

The backend is csrc/testing/host_cuda; NumPy computes in float64. Every path runs at small odd
sizes, under several schedules, with poisoned scratch memory. test_cuda.py covers what only a GPU
can show.
"""

from __future__ import annotations

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import STATE, check_row, check_step, runner, same_bits

DTYPES = ["float32", "bfloat16", "float16"]
ATTENTION = {"gate": "attention"}
GIVEN = {"gate": "given"}


@pytest.fixture
def run(testing_module):
    return runner(testing_module)


# --- against float64 -----------------------------------------------------------------------------


# Each size leaves a remainder of some split: tiles of 8, chunks of 32, splits of 128, warps of 32
SIZES = {
    "one of each": dict(B=1, d=1, V=1, K=1, H=1, d_k=1, S=1, lengths=[0]),
    "odd": dict(B=3, d=33, V=65, K=2, H=3, d_k=5, S=11),
    "chunks": dict(B=2, d=31, V=32, H=1, d_k=2, S=4),
    "two tiles": dict(B=9, d=7, V=33, H=2, d_k=1, S=3),
    "three tiles": dict(B=17, d=5, V=31, K=3, H=1, d_k=2, S=5),
    "splits": dict(B=3, d=9, V=5, H=2, d_k=3, S=300, lengths=[127, 128, 299]),
    "many splits": dict(B=1, d=4, V=3, H=1, d_k=1, S=128 * 34, lengths=[128 * 33 + 5]),
    "wide": dict(B=2, d=64, V=1100, H=2, d_k=3, S=4),  # more chunks than lanes
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_step_is_the_float64_one(run, seed, dtype, size, mix_probs):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, dtype, **SIZES[size], bias=size != "chunks")
    arguments["mix_probs"] = mix_probs
    step = run(arguments, dtype, record=True, seed=seed)
    check_step(arguments, step, dtype)


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("cap", [0.0, 2.5], ids=["plain", "capped"])
def test_postprocessing_and_objective_weights(run, seed, mix_probs, cap):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "bfloat16", B=5, V=40, K=3, bias=True)
    arguments |= {"mix_probs": mix_probs, "logit_scale": 0.3125, "logit_softcap": cap}
    arguments["objective_weights"] = rng.standard_normal((5, 3)).astype(np.float32)
    check_step(arguments, run(arguments, "bfloat16", seed=seed), "bfloat16")


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("gate", ["attention", "given"])
def test_controls_per_request(run, seed, gate, mix_probs):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float32", B=7, gate=gate)
    arguments["mix_probs"] = mix_probs
    f32 = {"dtype": np.float32}
    arguments["gate_offset"] = np.array([0, 3, -4, 200, -200, 0.5, 0], **f32)
    offset_only = run(arguments, seed=seed)
    check_step(arguments, offset_only, "float32")
    assert offset_only.alpha[3] == 1 and offset_only.alpha[4] == 0
    arguments["strength"] = np.array([0, 0.5, 1, 1.7, 3, 9, -1], **f32)
    step = run(arguments, seed=seed)
    check_step(arguments, step, "float32")
    assert step.alpha[0] == 0 and step.alpha[6] == 0
    # In a mixture of distributions, alpha is at most 1
    driven = np.float32(9) * offset_only.alpha[5]
    assert step.alpha[5] == (min(driven, 1) if mix_probs else driven)
    arguments["alpha"] = np.array([0.3, 0, 1, 0.25, 0.5, 0.75, 0.1], **f32)
    check_step(arguments, run(arguments, seed=seed), "float32")


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_alpha_of_0_and_1_select_and_never_multiply(run, seed, mix_probs):
    """Row 0 uses only the LM head, row 1 only the reward head. The other head may hold NaN."""
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float32", B=2, gate="given")
    arguments |= {"mix_probs": mix_probs, "alpha": np.array([0, 1], np.float32)}
    plain = run(arguments)
    check_step(arguments, plain, "float32")
    for name, row in (("reward_weight", 0), ("lm_weight", 1)):
        broken = arguments | {name: np.full_like(arguments[name], np.nan)}
        step = run(broken)
        for field in ("logits", "token", "logprob", "status"):
            assert getattr(step, field)[row].tobytes() == getattr(plain, field)[row].tobytes()
        assert step.status[1 - row] == 1
    infinite = arguments | {"gate_logit": np.array([-np.inf, np.inf], np.float32)}
    del infinite["alpha"]
    assert not same_bits(run(infinite), plain, but=["gate_logit"])


# --- cache ---------------------------------------------------------------------------------------


def test_new_position_that_is_padding_is_written_and_not_seen(run, seed):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "bfloat16", B=4, S=6, lengths=[0, 0, 3, 5])
    arguments["cache_valid"][2:] = True
    arguments["cache_k"][2:], arguments["cache_u"][2:] = model.narrow(0.5, "bfloat16"), 0.25
    arguments["new_valid"] = np.array([False, True, False, True])
    step = run(arguments, "bfloat16", record=True, seed=seed)
    check_step(arguments, step, "bfloat16")
    # Row 0's only column is padding, so it attends to nothing
    assert step.gate_logit[0] == arguments["gate_bias"][0]
    assert (step.attention[0] == 0).all() and (step.attention[2, :, 3] == 0).all()


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("length", [9, 10, 2**31 - 1, -1])
def test_full_cache_writes_nothing_and_says_so(run, seed, length, mix_probs):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float16", B=3, S=9, lengths=[4, 4, 8])
    arguments["mix_probs"] = mix_probs
    arguments["cache_length"][1] = length
    arguments |= {"seeds": np.arange(3), "draws": np.array([5, 6, 7])}
    arguments["strength"] = np.array([1, 0, 1], np.float32)
    step = run(arguments, "float16", record=True, seed=seed)
    for b in (0, 2):
        check_row(arguments, step, "float16", b)
    assert step.status[1] == 2 and step.token[1] == 0 and (step.attention[1] == 0).all()
    for field in (step.alpha, step.gate_logit, step.logprob, step.logits):
        assert np.isnan(field[1]).all()
    for name in STATE:
        assert step.state[name][1].tobytes() == arguments[name][1].tobytes()


def test_lengths_grow_step_by_step_until_the_cache_is_full(run, seed):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float32", B=2, S=3, lengths=[0, 1])
    for expected in ([0, 0], [0, 0], [0, 2], [2, 2]):
        arguments["hidden"] = rng.standard_normal((2, 13)).astype(np.float32)
        step = run(arguments, seed=seed)
        for b in range(2):
            if expected[b] == 0:
                check_row(arguments, step, "float32", b)
        assert step.status.tolist() == expected
        arguments |= step.state
    assert arguments["cache_length"].tolist() == [3, 3]


# --- determinism ---------------------------------------------------------------------------------


def everything(rng, dtype, B=10):
    """Arguments that reach every branch: a mixture of distributions, all filters, all controls."""
    arguments = model.random_arguments(
        rng, dtype, B=B, d=19, V=70, K=2, S=140, lengths=rng.integers(100, 139, B), bias=True
    )
    f32 = {"dtype": np.float32}
    return arguments | {
        "mix_probs": True,
        "logit_scale": 0.5,
        "logit_softcap": 20.0,
        "objective_weights": rng.standard_normal((B, 2)).astype(**f32),
        "gate_offset": rng.standard_normal(B).astype(**f32),
        "strength": rng.uniform(0.5, 1.5, B).astype(**f32),
        "temperature": rng.uniform(0.5, 2, B).astype(**f32),
        "top_k": rng.integers(20, 60, B).astype(np.int32),
        "top_p": rng.uniform(0.7, 0.99, B).astype(**f32),
        "min_p": rng.uniform(0, 0.05, B).astype(**f32),
        "new_valid": rng.random(B) < 0.9,
        "seeds": rng.integers(0, 2**62, B),
        "draws": rng.integers(0, 2**40, B),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_grid_schedule_and_scratch(run, seed, dtype):
    """Grid, block size, thread order and the workspace's old contents do not change a bit."""
    arguments = everything(np.random.default_rng(seed), dtype)
    first = run(arguments, dtype, record=True, blocks=1, threads=32)
    check_step(arguments, first, dtype)
    shapes = [(1, 96), (2, 64), (5, 32), (8, 256)]
    for i, (blocks, threads) in enumerate(shapes):
        shape = {"blocks": blocks, "threads": threads, "dirt": (0xFF, 0, 0x5A)[i % 3]}
        for schedule in (0, seed | 1, seed & ~1 or 2)[: 3 if threads == 64 else 2]:
            again = run(arguments, dtype, record=True, **shape, seed=schedule)
            assert not same_bits(first, again), (shape, schedule)


def test_default_launch_fills_the_device_and_no_more(run, seed):
    arguments = everything(np.random.default_rng(seed), "bfloat16")
    first = run(arguments, "bfloat16", record=True)
    small = {"multiprocessors": 3, "blocks_per_multiprocessor": 1}
    assert not same_bits(first, run(arguments, "bfloat16", record=True, blocks=0, threads=0))
    again = run(arguments, "bfloat16", record=True, blocks=0, threads=0, **small)
    assert not same_bits(first, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(run, seed, dtype):
    """Alone, first, last, beside rows of NaN, and in batches that end anywhere in a tile."""
    rng = np.random.default_rng(seed)
    arguments = everything(rng, dtype, B=17)
    shared = {
        k: v for k, v in arguments.items() if not (isinstance(v, np.ndarray) and len(v) == 17)
    }
    per_row = {k: v for k, v in arguments.items() if k not in shared}
    whole = run(arguments, dtype, record=True).arrays()
    nan = model.narrow(np.nan, dtype)
    for rows in ([4], [16], [9, 4], [2, 0, 4, 7, 7, 1, 3, 5], [4, *range(16, 4, -1)]):
        batch = shared | {k: v[rows].copy() for k, v in per_row.items()}
        if 2 in rows:
            batch["hidden"][0] = nan  # this neighbour is not compared
        part = run(batch, dtype, record=True).arrays()
        for i, row in enumerate(rows):
            for name in whole if row != 2 else ():
                assert part[name][i].tobytes() == whole[name][row].tobytes(), (name, rows, row)


def test_repeated_steps_are_equal_to_the_bit(run, seed):
    arguments = everything(np.random.default_rng(seed), "bfloat16", B=2)
    first = run(arguments, "bfloat16", record=True)
    for schedule in range(20):
        assert not same_bits(first, run(arguments, "bfloat16", record=True, seed=schedule))


# --- that the tests can fail ---------------------------------------------------------------------


def _differs(run, arguments, **bug):
    """Whether a seeded bug shows under at least one of a few schedules.

    Decoding is greedy here: if logits changed while a token is sampled, the sampler would read out
    of bounds and end the process.
    """
    arguments = {k: v for k, v in arguments.items() if k not in ("seeds", "draws")}
    right = run(arguments, "float32", record=True)
    for schedule in range(8):
        try:
            if same_bits(right, run(arguments, "float32", record=True, seed=schedule, **bug)):
                return True
        except RuntimeError as error:
            assert "deadlock" in str(error) or "diverged" in str(error)
            return True
    return False


@pytest.mark.parametrize("barrier", range(7))
def test_a_missing_grid_barrier_is_seen(run, seed, barrier):
    """With attention and mix_probs, the step has six grid barriers. There is no seventh."""
    arguments = everything(np.random.default_rng(seed), "float32", B=2)
    assert _differs(run, arguments, skipped_grid_barrier=barrier) == (barrier < 6)


@pytest.mark.parametrize("barrier", range(6))
def test_a_missing_block_barrier_is_seen(run, seed, barrier):
    """Each of three chunks has two barriers: z is complete, z may be reused. The last one is not
    needed.
    """
    arguments = everything(np.random.default_rng(seed), "float32", B=2)
    assert _differs(run, arguments, blocks=1, skipped_block_barrier=barrier) == (barrier < 5)


def test_a_grid_that_does_not_fit_is_refused(testing_module, run, seed):
    arguments = model.random_arguments(np.random.default_rng(seed), "float32")
    outputs = {
        f"out_{name}": np.zeros((2, 37) if name == "logits" else 2, dtype)
        for name, dtype in {
            "logits": np.float32,
            "alpha": np.float32,
            "gate_logit": np.float32,
            "token": np.int64,
            "logprob": np.float32,
            "status": np.int32,
        }.items()
    }

    def error(blocks=0, threads=0, index=0, **device):
        testing_module.set_device(**device)
        named = arguments | outputs
        try:
            return testing_module.decode_step(named, "float32", blocks, threads, index)
        finally:
            testing_module.set_device()

    before = {k: v.copy() for k, v in (arguments | outputs).items() if isinstance(v, np.ndarray)}
    # 4 multiprocessors hold 2 blocks each
    assert error(blocks=9) == "cudaErrorCooperativeLaunchTooLarge"
    assert error(blocks_per_multiprocessor=0) == "cudaErrorCooperativeLaunchTooLarge"
    assert error(cooperative_launch=False) == "cudaErrorNotSupported"
    assert error(index=1) == "cudaErrorInvalidDevice"
    for threads in (31, 48, 288):
        assert error(threads=threads) == "cudaErrorInvalidValue"
    for name, value in before.items():
        assert (arguments | outputs)[name].tobytes() == value.tobytes(), name
    assert error(blocks=8) == "cudaSuccess"


def test_an_empty_batch_launches_nothing(run):
    arguments = model.random_arguments(np.random.default_rng(0), "float32", B=0, gate="given")
    assert run(arguments, blocks=0, threads=0).token.shape == (0,)


# --- storage types -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_stored_value_widens_and_rounds_back(testing_module, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    widened = getattr(testing_module, f"{dtype}_to_float")(bits)
    exact = model.widen(bits, dtype)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN warns
        np.testing.assert_array_equal(widened.astype(np.float64), exact)
    numbers = ~np.isnan(exact)
    back = getattr(testing_module, f"float_to_{dtype}")(widened)
    np.testing.assert_array_equal(back[numbers], bits[numbers])
    assert np.isnan(model.widen(back[~numbers], dtype)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even(testing_module, seed, dtype):
    rng = np.random.default_rng(seed)
    finite = model.widen(np.arange(2**15, dtype=np.uint16), dtype)
    finite = finite[np.isfinite(finite)]
    middle = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    values = np.concatenate(
        [
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(0)),
            rng.standard_normal(1000).astype(np.float32),
            np.float32([65519.9, 65520, 3.4e38, np.inf, 1e-8, 2.98e-8, 1e-45, 0]),
        ]
    )
    values = np.concatenate([values, -values])
    got = getattr(testing_module, f"float_to_{dtype}")(values)
    np.testing.assert_array_equal(got, model.narrow(values, dtype))
