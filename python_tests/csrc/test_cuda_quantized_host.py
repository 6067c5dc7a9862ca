# SPDX-License-Identifier: Apache-2.0
"""int8, fp8 and int4 heads in the CUDA step, on the host backend, against float64.

The tests cover the streaming and the plain path, hidden states of every dtype, all tiles and both
copy engines.
"""

from __future__ import annotations

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import check_step, runner, same_bits, stream_runner

from dualhead_ext.quantization import FORMATS

BULK, PIECES = 9, 8  # compute capability: 9 has bulk copies of rows, 8 copies 16 bytes per lane
EVERY_FORMAT = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def run(testing_module):
    return stream_runner(testing_module)


def heads(rng, name, dtype, *, d, **sizes):
    options = {"B": 2, "V": 37, "H": 2, "d_k": 8, "S": 5, "bias": True, "d": d} | sizes
    arguments = model.random_arguments(rng, dtype, aligned=True, **options)
    return model.quantized(rng, arguments, name, apart=16)


SIZES = {  # d is a multiple of int4's groups; other formats get 16 more, a multiple of 16 only
    "least": dict(B=1, d=128, V=1, H=1, d_k=1, S=1, lengths=[0]),
    "one row": dict(B=1, d=1152, V=150),
    "odd": dict(B=3, d=384, V=65, K=2),
    "two tiles": dict(B=9, d=256, V=41, K=3),
    "four tiles": dict(B=17, d=128, V=33),
    "eight tiles": dict(B=64, d=256, V=70),
    "twice": dict(B=70, d=128, V=20),
}


@EVERY_FORMAT
@pytest.mark.parametrize("size", SIZES)
def test_step_is_the_float64_one(run, seed, name, size):
    """The sizes take turns with the dtypes of hidden states and the copy engines."""
    turn = list(FORMATS).index(name) + list(SIZES).index(size)
    dtype, engine = ("float32", "bfloat16", "float16")[turn % 3], (BULK, PIECES)[turn % 2]
    rng = np.random.default_rng(seed)
    sizes = SIZES[size] | {"d": SIZES[size]["d"] + (0 if name == "int4" else 16)}
    arguments = heads(rng, name, dtype, **sizes) | {"mix_probs": bool(seed % 2)}
    step = run(arguments, dtype, record=True, compute_major=engine, seed=seed // 2)
    check_step(arguments, step, dtype)


@EVERY_FORMAT
def test_every_stored_number_is_exact_and_in_its_place(run, seed, name):
    """Each row of hidden states holds a single 1, so that the logits are the stored values."""
    rng = np.random.default_rng(seed)
    arguments = heads(rng, name, "bfloat16", d=128, B=64, V=64, gate="given", bias=False)
    arguments["alpha"] = np.repeat(np.array([0, 1], np.float32), 32)
    for head in ("lm", "reward"):
        arguments[f"{head}_scale"] = np.ones_like(arguments[f"{head}_scale"])
    weights = {
        h: model.head_weight(arguments, h, "bfloat16").reshape(64, 128) for h in ("lm", "reward")
    }
    for first in (0, 32, 64, 96):
        hidden = np.zeros((64, 128), np.float32)
        hidden[np.arange(64), np.arange(64) % 32 + first] = 1
        arguments["hidden"] = model.narrow(hidden, "bfloat16")
        logits = run(arguments, "bfloat16").logits
        chosen = slice(first, first + 32)
        np.testing.assert_array_equal(logits[:32], weights["lm"][:, chosen].T)
        np.testing.assert_array_equal(logits[32:], weights["reward"][:, chosen].T)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_of_any_size_are_not_rounded(run, seed, name, dtype):
    """Rows range from 1e-30 to 1e30, and the values of one row are 30 binary places apart.

    float16 could not hold any of them. The error is that of fp32 sums, which round once.
    """
    rng = np.random.default_rng(seed)
    arguments = heads(rng, name, dtype, d=256, B=5, gate="given", bias=False)
    arguments["alpha"] = np.full(5, 0.5, np.float32)
    hidden = rng.standard_normal((5, 256)) * np.array([1, 1e-30, 1e30, 1, 3e4])[:, None]
    hidden[3, ::2] *= 2.0**-30
    arguments["hidden"] = model.narrow(hidden, dtype)
    step = run(arguments, dtype)
    assert step.status.tolist() == [0] * 5
    for b in range(5):
        size = sum(
            0.5
            * np.abs(model.head_weight(arguments, head, dtype)).reshape(37, 256)
            @ np.abs(model.widen(arguments["hidden"][b], dtype))
            for head in ("lm", "reward")
        )
        error = np.abs(step.logits[b] - model.row_logits(arguments, dtype, b, 0.5))
        assert (error <= 1e-6 * size).all(), b


@EVERY_FORMAT
def test_bad_hidden_states_stay_alone(run, seed, name):
    rng = np.random.default_rng(seed)
    arguments = heads(rng, name, "float32", d=128, B=10, gate="given")
    plain = run(arguments, "float32")
    arguments["hidden"] = arguments["hidden"].copy()
    for row, poison in ((1, np.nan), (4, np.inf), (8, -np.inf)):
        arguments["hidden"][row, 5] = poison
    arguments["hidden"] = np.pad(arguments["hidden"], ((0, 0), (0, 8)))[:, :128]
    step = run(arguments, "float32")
    assert step.status.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    for b in (0, 2, 3, 5, 6, 7, 9):
        assert step.logits[b].tobytes() == plain.logits[b].tobytes()


@pytest.mark.parametrize(
    ("name", "dtype"), [("int8", "bfloat16"), ("fp8", "float32"), ("int4", "bfloat16")]
)
def test_bits_depend_on_no_batch_device_or_schedule(run, seed, name, dtype):
    rng = np.random.default_rng(seed)
    arguments = heads(rng, name, dtype, d=384, B=40, V=17)
    first = run(arguments, dtype, record=True)
    for i, (kib, blocks) in enumerate([(163, 1), (99, 3)]):
        device = {"compute_major": (BULK, PIECES)[i % 2], "shared_kib": kib, "blocks": blocks}
        again = run(arguments, dtype, record=True, dirt=0, seed=2 * seed + i, **device)
        assert not same_bits(first, again), device
    per_row = {k for k, v in arguments.items() if isinstance(v, np.ndarray) and len(v) == 40}
    for rows in ([7], list(range(12, 0, -1)), list(range(22, 40))):
        batch = {k: v[rows] if k in per_row else v for k, v in arguments.items()}
        part = run(batch, dtype, record=True).arrays()
        for i, row in enumerate(rows):
            for field, value in first.arrays().items():
                assert part[field][i].tobytes() == value[row].tobytes(), (field, rows, row)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_16_does_not_divide_take_the_plain_path(testing_module, seed, name, dtype):
    rng = np.random.default_rng(seed)
    d = 128 if name == "int4" else 27
    arguments = model.random_arguments(rng, dtype, B=3, d=d, V=41, K=2, bias=True)
    arguments = model.quantized(rng, arguments, name, apart=3)
    assert testing_module.stream_plan(arguments, dtype) is None
    check_step(arguments, runner(testing_module)(arguments, dtype, record=True, seed=seed), dtype)


def test_every_plan_is_among_the_tested_ones(testing_module, seed):
    rng = np.random.default_rng(seed)
    found = set()
    for name in FORMATS:
        for size in SIZES.values():
            for dtype in ("float32", "bfloat16"):
                arguments = heads(rng, name, dtype, **size)
                plan = testing_module.stream_plan(arguments, dtype, 227)
                assert plan["shared_bytes"] <= 227 * 1024 and 2 <= plan["stages"] <= 8
                found |= {(key, plan[key]) for key in ("batch_tile", "resident")}
    expected = {("batch_tile", tile) for tile in (8, 16, 32, 64)}
    assert found == expected | {("resident", True), ("resident", False)}
