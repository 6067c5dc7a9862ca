# SPDX-License-Identifier: Apache-2.0
"""The CUDA step's streaming path (csrc/kernels/cuda/stream.cu) on the host backend, against
float64.

The tests cover both copy engines, all batch tiles, and remainders of every split. A row's bits
depend on none of these. The host backend completes copies late and in any order
(csrc/testing/host_cuda/async.h).
"""

from __future__ import annotations

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import check_row, check_step, runner, same_bits, stream_runner

from tools.gpu import prediction

DTYPES = ["bfloat16", "float16"]
BULK, PIECES = 9, 8  # compute capability: 9 has bulk copies of rows, 8 copies 16 bytes per lane


@pytest.fixture
def run(testing_module):
    return stream_runner(testing_module)


def aligned(rng, dtype, **sizes):
    options = {"B": 2, "d": 40, "V": 37, "H": 2, "d_k": 8, "S": 5, "bias": True} | sizes
    return model.random_arguments(rng, dtype, aligned=True, **options)


# --- against float64 -----------------------------------------------------------------------------

# Remainders of units of 8, tiles of 8 and 16 units, runs of 32 inputs, stages and batch tiles
SIZES = {
    "least": dict(B=1, d=8, V=1, H=1, d_k=1, S=1, lengths=[0]),
    "one row": dict(B=1, d=1000, V=301, d_k=3),
    "odd": dict(B=3, d=136, V=65, K=2),
    "tile": dict(B=8, d=128, V=64),
    "two tiles": dict(B=9, d=72, V=150, K=3),
    "four tiles": dict(B=17, d=264, V=33, K=4),
    "eight tiles": dict(B=33, d=200, V=131),
    "full": dict(B=64, d=96, V=270, S=300, lengths=range(236, 300)),
    "twice": dict(B=70, d=40, V=20),
}


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", [BULK, PIECES], ids=["bulk", "pieces"])
def test_step_is_the_float64_one(run, seed, dtype, size, engine):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, dtype, **SIZES[size])
    for mix_probs in (False, True):
        arguments["mix_probs"] = mix_probs
        step = run(arguments, dtype, record=True, compute_major=engine, seed=seed + mix_probs)
        check_step(arguments, step, dtype)


LARGEST = {  # the largest supported sizes: hidden size, vocabulary, width of the gate
    "hidden": dict(B=2, d=8192, V=20),
    "hidden, a full batch": dict(B=64, d=8192, V=9),
    "vocabulary": dict(B=2, d=8, V=262144),
    "gate": dict(B=2, d=16, V=9, H=8, d_k=128, S=140, lengths=[130, 139]),
}


@pytest.mark.parametrize("size", LARGEST)
def test_the_largest_sizes(run, seed, size):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", **LARGEST[size])
    if size == "vocabulary":  # the best token has an index that needs more than 16 bits
        arguments["lm_weight"][261111] = model.narrow(8 * np.ones(8), "bfloat16")
        arguments["hidden"][...] = model.narrow(np.ones((2, 8)), "bfloat16")
        arguments["alpha"] = np.float32([0, 0.25])
    step = run(arguments, "bfloat16", seed=seed)
    check_step(arguments, step, "bfloat16")
    assert size != "vocabulary" or step.token.tolist() == [261111, 261111]


def test_every_plan_is_among_the_tested_ones(testing_module, seed):
    """Less shared memory gives shorter runs. The sizes of these tests reach every kind of plan."""
    rng = np.random.default_rng(seed)
    found = set()
    for size in SIZES.values():
        arguments = aligned(rng, "bfloat16", **size)
        for kib in (227, 163, 99):
            plan = testing_module.stream_plan(arguments, "bfloat16", kib)
            assert plan["shared_bytes"] <= kib * 1024 and 2 <= plan["stages"] <= 8
            found |= {(name, plan[name]) for name in ("batch_tile", "blocks", "resident")}
            found.add(("kept_tiles", plan["kept_tiles"]))
    values = {"batch_tile": [8, 16, 32, 64], "blocks": [1, 2], "resident": [True, False]}
    values["kept_tiles"] = [0, 4]
    assert found == {(name, value) for name, many in values.items() for value in many}


@pytest.mark.parametrize("format", ["bfloat16", "int8", "fp8", "int4"])
def test_the_ring_has_four_stages_or_more(testing_module, seed, format):
    """At d = 4096 on an H200: with two, memory would wait while one of them is multiplied."""
    rng = np.random.default_rng(seed)
    for B in (1, 8, 9, 16, 17, 32, 33, 64):
        arguments = aligned(rng, "bfloat16", B=B, d=4096, V=8, gate="given")
        if format != "bfloat16":
            arguments = model.quantized(rng, arguments, format, apart=16)
        assert testing_module.stream_plan(arguments, "bfloat16")["stages"] >= 4, B


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("d", [4096, 8192])
def test_the_prediction_knows_the_plans(testing_module, seed, format, d):
    """The hidden sizes of the benchmark. Four blocks with 31 units each: as many as 132 blocks have
    at V = 32000."""
    rng = np.random.default_rng(seed)
    for B in (1, 8, 9, 16, 17, 32, 33, 64):
        arguments = aligned(rng, "bfloat16", B=B, d=d, V=992)
        if format != "bf16":
            arguments = model.quantized(rng, arguments, format, apart=16)
        plan = testing_module.stream_plan(arguments, "bfloat16", grid=4)
        known = prediction._plan(prediction.PRESENT, d, 32000, B, format, "full")
        names = ("batch_tile", "blocks", "stages", "under_way", "projects_early")
        found = [plan[name] for name in names]
        wanted = [known.batch, known.blocks, known.stages, known.under_way, known.early]
        assert found == wanted, B


def test_the_whole_ring_is_under_way_where_alpha_comes_in_time(testing_module, seed):
    """The gate's loads wait behind the ring. A block's tiles of bf16 last longer than that, those
    of int4 and those of a small model do not."""
    rng = np.random.default_rng(seed)

    def whole(format=None, grid=4, **sizes):
        arguments = aligned(rng, "bfloat16", **{"d": 4096, "V": 992} | sizes)
        if format:
            arguments = model.quantized(rng, arguments, format, apart=16)
        plan = testing_module.stream_plan(arguments, "bfloat16", grid=grid)
        return plan["under_way"] == plan["stages"]

    assert whole(B=1) and whole(B=16) and whole(B=64) and whole("int8", B=1)
    assert not whole("int4", B=1) and not whole(B=1, d=576) and not whole(B=1, grid=40)
    assert whole("int4", B=1, gate="given"), "there is no gate to wait for"


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("engine", [BULK, PIECES], ids=["bulk", "pieces"])
@pytest.mark.parametrize("B", [1, 8, 9, 40])
def test_bits_do_not_depend_on_device_grid_or_schedule(run, seed, engine, B):
    """The bits do not depend on any of the following.

    They are the amount of shared memory (and so the stages, the runs and what stays resident), the
    number of blocks, the order in which threads run and copies complete, the workspace's old
    contents, and the copy engine.
    """
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=B, d=584, V=150, K=2)
    first = run(arguments, "bfloat16", record=True)
    check_step(arguments, first, "bfloat16")
    for i, (kib, blocks) in enumerate([(227, 1), (163, 3), (99, 2), (99, 4)]):
        device = {"compute_major": engine, "shared_kib": kib, "blocks": blocks}
        dirt = (0xFF, 0, 0x5A, 1)[i]
        again = run(arguments, "bfloat16", record=True, dirt=dirt, seed=2 * seed + i, **device)
        assert not same_bits(first, again), device
    everywhere = run(arguments, "bfloat16", record=True, blocks=0, blocks_per_multiprocessor=2)
    assert not same_bits(first, everywhere)


# --- a row's company -----------------------------------------------------------------------------


def everything(rng, dtype, B):
    """Arguments with all controls, for both mixtures, and with the filters that need few passes."""
    f32 = {"dtype": np.float32}
    return aligned(rng, dtype, B=B, V=34, K=2, S=140, lengths=rng.integers(100, 139, B)) | {
        "logit_scale": 0.5,
        "logit_softcap": 20.0,
        "objective_weights": rng.standard_normal((B, 2)).astype(**f32),
        "gate_offset": rng.standard_normal(B).astype(**f32),
        "strength": rng.uniform(0.5, 1.5, B).astype(**f32),
        "temperature": rng.uniform(0.5, 2, B).astype(**f32),
        "min_p": rng.uniform(0, 0.05, B).astype(**f32),
        "new_valid": rng.random(B) < 0.9,
        "seeds": rng.integers(0, 2**62, B),
        "draws": rng.integers(0, 2**40, B),
    }


@pytest.mark.parametrize(("dtype", "mix_probs"), [("bfloat16", False), ("float16", True)])
def test_a_row_has_the_same_bits_in_every_batch(run, seed, dtype, mix_probs):
    """Alone, anywhere, beside NaN, in batches of every tile, and in one of more than 64 rows."""
    rng = np.random.default_rng(seed)
    arguments = everything(rng, dtype, 64) | {"mix_probs": mix_probs}
    shared = {
        k: v for k, v in arguments.items() if not (isinstance(v, np.ndarray) and len(v) == 64)
    }
    per_row = {k: v for k, v in arguments.items() if k not in shared}
    step = run(arguments, dtype, record=True)
    check_step(arguments, step, dtype)
    whole = step.arrays()
    order = rng.permutation(64)
    for count in (1, 3, 9, 17, 33, 66):
        rows = np.concatenate([order, order])[:count]
        batch = shared | {k: v[rows].copy() for k, v in per_row.items()}
        hidden = np.zeros((count, 48), np.uint16)[:, :40]  # rows start at multiples of 16 bytes
        hidden[...] = arguments["hidden"][rows]
        if count > 1:
            hidden[count // 2] = model.narrow(np.nan, dtype)  # this neighbour is not compared
        batch["hidden"] = hidden
        part = run(batch, dtype, record=True, compute_major=(BULK, PIECES)[count % 2]).arrays()
        for i, row in enumerate(rows):
            for name in whole if i != count // 2 or count == 1 else ():
                assert part[name][i].tobytes() == whole[name][row].tobytes(), (name, count, i)


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_controls_select_and_never_multiply(run, seed, mix_probs):
    """At alpha 0 or 1 the unused head may hold NaN.

    Offsets and strengths act as on the plain path.
    """
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=7, gate="given") | {"mix_probs": mix_probs}
    f32 = {"dtype": np.float32}
    arguments["gate_offset"] = np.array([0, 3, -4, 200, -200, 0.5, 0], **f32)
    arguments["strength"] = np.array([0, 0.5, 1, 1.7, 3, 9, -1], **f32)
    check_step(arguments, run(arguments, "bfloat16", seed=seed), "bfloat16")
    ends = aligned(rng, "bfloat16", gate="given") | {"mix_probs": mix_probs}
    ends["alpha"] = np.array([0, 1], **f32)
    plain = run(ends, "bfloat16")
    check_step(ends, plain, "bfloat16")
    for name, row in (("reward_weight", 0), ("lm_weight", 1)):
        weight = ends[name].copy() if name == "reward_weight" else np.empty((37, 56), np.uint16)
        broken = weight if name == "reward_weight" else weight[:, :40]
        broken[...] = model.narrow(np.nan, "bfloat16")
        step = run(ends | {name: broken}, "bfloat16")
        for field in ("logits", "token", "logprob", "status"):
            assert getattr(step, field)[row].tobytes() == getattr(plain, field)[row].tobytes()
        assert step.status[1 - row] == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_bad_rows_and_full_caches_stay_alone(run, seed, poison):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=10, S=6, lengths=rng.integers(0, 6, 10))
    arguments |= {"seeds": np.arange(10), "draws": np.zeros(10, np.int64)}
    healthy = run(arguments, "bfloat16", record=True)
    check_step(arguments, healthy, "bfloat16")
    arguments["hidden"][1, 5] = model.narrow(poison, "bfloat16")
    arguments["cache_length"][8] = 6
    step = run(arguments, "bfloat16", record=True, seed=seed)
    assert step.status.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 2, 0]
    assert step.token[1] == step.token[8] == 0 and np.isnan(step.logprob[[1, 8]]).all()
    assert np.isnan(step.logits[8]).all() and step.state["cache_length"][8] == 6
    for b in (0, 2, 3, 4, 5, 6, 7, 9):
        for name, value in step.arrays().items():
            assert value[b].tobytes() == healthy.arrays()[name][b].tobytes(), name


FILTERS = {
    "top_k": dict(top_k=[3, 0, 1, 1000]),
    "top_p": dict(top_p=[0.5, 1.0, 0.0, 0.95]),
    "all": dict(
        temperature=[0.8, 2.0, 0.0, 1.0],
        top_k=[5, 20, 3, -1],
        top_p=[0.8, 0.9, 0.5, 0.7],
        min_p=[0.05, 0.1, 0.5, 0.02],
    ),
}


@pytest.mark.parametrize("filters", FILTERS)
def test_sampled_token_wins_the_race_among_what_the_filters_leave(run, seed, filters):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "float16", B=4, V=101, gate="given")
    for name, values in FILTERS[filters].items():
        arguments[name] = np.array(values, np.int32 if name == "top_k" else np.float32)
    for mix_probs in (False, True):
        arguments["seeds"] = rng.integers(-(2**63), 2**63 - 1, 4)
        arguments |= {"draws": np.arange(4) + 2**32, "mix_probs": mix_probs}
        check_step(arguments, run(arguments, "float16", seed=seed), "float16")


def test_lengths_grow_step_by_step(run, seed):
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=2, S=3, lengths=[0, 1])
    for expected in ([0, 0], [0, 0], [0, 2]):
        arguments["hidden"] = model.narrow(rng.standard_normal((2, 40)), "bfloat16")
        step = run(arguments, "bfloat16", seed=seed)
        for b in range(2):
            if expected[b] == 0:
                check_row(arguments, step, "bfloat16", b)
        assert step.status.tolist() == expected
        arguments |= step.state


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("engine", [BULK, PIECES], ids=["bulk", "pieces"])
@pytest.mark.parametrize("K", [1, 3])
def test_a_head_that_no_row_needs_is_no_longer_read(
    testing_module, run, seed, K, engine, mix_probs
):
    """Once every row has its alpha, the unneeded head is not read any further.

    Without attention this is soon. The results are the same, with fewer bytes read. A row whose
    alpha is NaN needs neither head.
    """
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=3, d=520, V=540, K=K, gate="given")
    arguments |= {"mix_probs": mix_probs, "seeds": np.arange(3), "draws": np.arange(3)}
    bytes_read = {}
    for alpha in (0.0, 0.5, 1.0):
        arguments["alpha"] = np.array([alpha, np.nan, alpha], np.float32)
        step = run(arguments, "bfloat16", compute_major=engine, seed=seed)
        bytes_read[alpha] = testing_module.bytes_copied()
        assert step.status.tolist() == [0, 1, 0]
        for b in (0, 2):
            check_row(arguments, step, "bfloat16", b)
    one = 540 * 520 * 2  # bytes of one matrix
    # Hidden states stay in shared memory and are not copied again
    assert bytes_read[0.5] == (K + 1) * one
    # Copies of both heads that were already requested: the ring buffers of two blocks.
    early = 2 * testing_module.stream_plan(arguments, "bfloat16")["stages"] * 128 * 256
    assert one < bytes_read[0.0] <= one + early < 0.9 * bytes_read[0.5], bytes_read
    assert K * one < bytes_read[1.0] <= K * one + early < bytes_read[0.5], bytes_read


@pytest.mark.quick_cases(10)
@pytest.mark.parametrize("format", ["bfloat16", "float16", "int8", "fp8", "int4"])
@pytest.mark.parametrize(("d", "B"), [(2048, 64), (4096, 1), (4096, 9), (8192, 1)])
def test_one_instruction_copies_a_kilobyte_or_more(testing_module, run, seed, format, d, B):
    """The mean over a step, for the hidden sizes of the benchmark.

    The producer is a single lane: at 16.5 bytes per clock, it has 62 clocks to copy 1 KiB.
    """
    rng = np.random.default_rng(seed)
    dtype = "float16" if format == "float16" else "bfloat16"
    arguments = aligned(rng, dtype, B=B, d=d, V=152, gate="given")
    if format not in ("bfloat16", "float16"):
        arguments = model.quantized(rng, arguments, format, apart=16)
    run(arguments, dtype, seed=seed)
    assert testing_module.bytes_copied() >= 1024 * testing_module.boxes_copied() > 0


# --- which path ----------------------------------------------------------------------------------


def test_what_streams_and_what_does_not(testing_module, seed):
    rng = np.random.default_rng(seed)
    base = aligned(rng, "bfloat16", d_k=3)

    def plan(**changes):
        return testing_module.stream_plan(base | changes, "bfloat16")

    assert plan()
    assert not testing_module.stream_plan(aligned(rng, "float32"), "float32")
    for d in (7, 12, 36):
        assert not testing_module.stream_plan(aligned(rng, "bfloat16", d=d), "bfloat16")
    for name in ("hidden", "lm_weight", "reward_weight"):
        apart = np.zeros((*base[name].shape[:-1], 44), np.uint16)
        # The rows' stride of 88 bytes is not a multiple of 16
        assert not plan(**{name: apart[..., :40]}), name
        flat = np.zeros(base[name].size + 1, np.uint16)[1:]
        assert not plan(**{name: flat.reshape(base[name].shape)}), name  # nor is the address


def test_a_device_with_too_little_shared_memory_refuses(testing_module, run, seed):
    arguments = aligned(np.random.default_rng(seed), "bfloat16", gate="given")
    assert testing_module.stream_plan(arguments, "bfloat16", 20) is None
    with pytest.raises(AssertionError, match="cudaErrorInvalidConfiguration"):
        runner(testing_module)(arguments, "bfloat16", blocks=0, threads=0, shared_kib=20)
    with pytest.raises(AssertionError, match="cudaErrorInvalidValue"):
        run(arguments, "bfloat16", threads=64)
    with pytest.raises(AssertionError, match="cudaErrorCooperativeLaunchTooLarge"):
        run(arguments, "bfloat16", blocks=5)  # more blocks than the 4 multiprocessors


# --- that the tests can fail ---------------------------------------------------------------------


_CAUGHT = ("deadlock", "diverged", "no progress", "mbarrier")


def _differs(run, arguments, schedules=8, **bug):
    """Whether a seeded bug shows under at least one of a few schedules."""
    right = run(arguments, "bfloat16", record=True)
    for schedule in range(schedules):
        device = {"seed": schedule, "compute_major": (BULK, PIECES)[schedule // 2 % 2]}
        try:
            if same_bits(right, run(arguments, "bfloat16", record=True, **device, **bug)):
                return True
        except RuntimeError as error:
            assert any(word in str(error) for word in _CAUGHT)
            return True
    return False


@pytest.fixture
def long_enough(seed):
    """Sizes that give three rounds of the ring in every block, and use all the barriers.

    These are the gate's three barriers and those of mix_probs.
    """
    rng = np.random.default_rng(seed)
    arguments = aligned(rng, "bfloat16", B=2, d=520, V=270)
    return arguments | {"mix_probs": True}


@pytest.mark.parametrize("barrier", [1, 2, 3, 4])
def test_a_missing_grid_barrier_is_seen(run, long_enough, barrier):
    """Barrier 1 follows the heads and the gate, 2 and 3 belong to mix_probs. There is no fifth."""
    assert _differs(run, long_enough, skipped_grid_barrier=barrier) == (barrier < 4)


def test_counters_that_are_not_zero_yet_are_seen(run, seed):
    """The first grid barrier. It shows only if a block is late by the time of a whole gate."""
    arguments = aligned(np.random.default_rng(seed), "bfloat16", d=8, S=300, lengths=[290, 290])
    assert _differs(run, arguments, 400, blocks=4, skipped_grid_barrier=0)


@pytest.mark.parametrize("wait", [0, 1, 3, 9])
def test_a_missing_wait_for_a_copy_is_seen(run, long_enough, wait):
    assert _differs(run, long_enough, skipped_copy_wait=wait)


@pytest.mark.parametrize("barrier", range(6))
def test_a_missing_block_or_gate_barrier_is_seen(run, long_enough, barrier):
    """Block barriers in order: one after the mbarriers are initialised, those of the phases after
    the products, and two each for the gate's attention and its normalisation.
    """
    assert _differs(run, long_enough, skipped_block_barrier=barrier)
