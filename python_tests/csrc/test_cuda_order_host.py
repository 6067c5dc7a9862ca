# SPDX-License-Identifier: Apache-2.0
"""The order of memory accesses in the CUDA step, on the host backend (csrc/testing/host_cuda).

The module dualhead_ordered reports every access of the kernels to global and shared memory. A step
stops if a thread reads what another wrote without an order that a device guarantees: a barrier, or
a counter that is raised with release and read with an acquire fence. Bulk copies need a proxy fence
as well, and what they overwrite must have been read.
"""

from __future__ import annotations

import re
from collections import Counter

import native
import numpy as np
import numpy_decode as model
import pytest
from cuda_host import CLOSE, check_step, runner, same_bits, stream_runner

# Projections before and after the grid barrier; hidden states that the grid prepares, and that it
# does not; one and two passes over objectives; the correction, whose rows the copy engine reads;
# blocks with several tiles, of which the first ends before alpha is known; stages of the ring that
# are filled again.
CASES = {
    "one request": dict(B=1, d=584, V=150, S=150, lengths=[140]),
    "late projections": dict(B=66, d=144, V=65, quantized="int8"),
    "objectives": dict(B=3, d=136, V=65, K=3),
    "prepared": dict(B=20, d=2048, V=20, quantized="int8"),
    "int4": dict(B=3, d=512, V=150, quantized="int4"),
    "embedding": dict(B=5, d=136, V=65, reward_head="embedding"),
    "embedding, 24 rows": dict(B=9, d=2048, V=20, reward_head="embedding"),
    "embedding, int8": dict(B=9, d=2048, V=20, reward_head="embedding", quantized="int8"),
    "low rank": dict(B=5, d=136, V=65, reward_head="lowrank"),
    "several tiles, given gate": dict(B=5, d=136, V=515, gate="given"),
    "several tiles, low rank": dict(B=5, d=136, V=515, reward_head="lowrank"),
    "several rounds": dict(B=2, d=520, V=270),
}


# One row each whose winner the filters keep and reject; top-p after top-k.
SAMPLED = {
    "several tiles, given gate": dict(
        seeds=np.arange(5),
        draws=np.arange(5),
        top_k=np.array([3, 0, 20, 1, 0], np.int32),
        top_p=np.array([1.0, 0.5, 0.5, 1.0, 1.0], np.float32),
        min_p=np.array([0.0, 0.0, 0.02, 0.0, 0.1], np.float32),
    )
}
UNORDERED = re.compile("without (an order between them|a proxy fence)")
ROUNDED = {"rtol": 0, "atol": 0.12}  # an embedding head rounds the moved hidden state to bfloat16


@pytest.fixture(scope="module")
def ordered():
    return native.testing_module("dualhead_ordered")


@pytest.fixture
def run(ordered):
    return stream_runner(ordered)


def check(arguments, step):
    embeds = arguments.get("reward_head") == "embedding"
    check_step(arguments, step, "bfloat16", ROUNDED if embeds else CLOSE)


def arguments_of(case, seed):
    sizes = {"H": 2, "d_k": 8, "S": 5} | CASES[case]
    format = sizes.pop("quantized", None)
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "bfloat16", aligned=True, **sizes)
    arguments |= {name: values.copy() for name, values in SAMPLED.get(case, {}).items()}
    return arguments if format is None else model.quantized(rng, arguments, format, apart=16)


@pytest.mark.parametrize("case", CASES)
def test_every_read_is_ordered_behind_its_write(run, testing_module, seed, case):
    arguments = arguments_of(case, seed)
    for probs in (False, True):
        arguments["mix_probs"] = probs
        engine = 8 if probs else 9  # copies of sixteen bytes, and boxes
        step = run(arguments, "bfloat16", record=True, seed=seed, blocks=3, compute_major=engine)
        check(arguments, step)
        plain = stream_runner(testing_module)(arguments, "bfloat16", record=True, blocks=3)
        assert not same_bits(step, plain)


SCHEDULES = 8


def executed(run, ordered, arguments, seed):
    """What orders a step, {place in the code: (what, role)}, under any schedule."""
    found = {}
    for schedule in range(seed, seed + SCHEDULES):
        run(arguments, "bfloat16", record=True, seed=schedule, blocks=3)
        found |= ordered.orderings()
    roles = ["consumer"] * 8 + ["gate"] * 3 + ["producer"]  # by warp (stream.cuh)
    return {place: (what, roles[warp]) for place, (what, warp) in found.items()}


def stops_without(run, place, arguments, seed):
    """Whether a step stops under any schedule if one signal or fence orders nothing."""
    for schedule in range(seed, seed + SCHEDULES):
        try:
            run(arguments, "bfloat16", record=True, seed=schedule, blocks=3, missing=place)
        except RuntimeError as error:
            assert UNORDERED.search(str(error)), error
            return True
    return False


# The gate signals once per phase and waits for all other blocks; once a row has its alpha, it
# signals that. Consumers look for alpha when a tile ends (has_reached), and wait for it in their
# last tile; the producer looks before each stage (learn_needs).
@pytest.mark.parametrize(
    ("case", "signals", "fences"),
    [
        ("one request", 3, {"gate": 2, "consumer": 1, "producer": 1}),
        ("late projections", 4, {"gate": 3, "consumer": 1}),
        ("embedding", 3, {"gate": 2, "consumer": 1}),
        ("several tiles, given gate", 1, {"consumer": 2, "producer": 1}),
        ("several tiles, low rank", 3, {"gate": 2, "consumer": 2}),
    ],
)
def test_each_signal_and_acquire_fence_is_necessary(run, ordered, seed, case, signals, fences):
    arguments = arguments_of(case, seed)
    found = executed(run, ordered, arguments, seed)
    found = {place: one for place, one in found.items() if one[0] in ("signal", "acquire fence")}
    expected = {("acquire fence", role): count for role, count in fences.items()}
    assert Counter(found.values()) >= Counter(expected | {("signal", "gate"): signals})
    useless = [
        one for place, one in found.items() if not stops_without(run, place, arguments, seed)
    ]
    assert not useless


def test_a_stage_is_filled_again_once_every_lane_has_read_it(run, ordered, seed):
    """The lane that releases a stage knows of the others' reads by a barrier of its warp."""
    arguments = arguments_of("several rounds", seed)
    run(arguments, "bfloat16", seed=seed, blocks=2)
    barriers = [
        place
        for place, (what, warp) in ordered.orderings().items()
        if what == "warp barrier" and warp < 8
    ]
    stopped = []
    for place in barriers:
        try:
            run(arguments, "bfloat16", seed=seed, blocks=2, missing=place)
        except RuntimeError as error:
            stopped.append(str(error))
    assert any(re.search("thread 35[2-9].* overwrites what .* reads", error) for error in stopped)


@pytest.mark.parametrize("case", ["prepared", "embedding, 24 rows"])
def test_bulk_copies_of_what_the_grid_wrote_stand_behind_a_fence(run, ordered, seed, case):
    """Of hidden states for quantised weights, and of the rows of a correction."""
    arguments = arguments_of(case, seed)
    assert not ordered.stream_plan(arguments, "bfloat16")["resident"]
    check(arguments, run(arguments, "bfloat16", seed=seed))
    [fence] = [place for place, (what, _) in ordered.orderings().items() if what == "proxy fence"]
    with pytest.raises(RuntimeError, match="without a proxy fence"):
        run(arguments, "bfloat16", seed=seed, missing=fence)


@pytest.mark.parametrize(
    ("case", "barrier"),
    [("one request", i) for i in range(4)]
    + [("embedding", i) for i in (0, 1, 3, 4, 5)]
    + [("embedding, int8", 2)],
)
def test_without_a_grid_barrier_something_is_not_ordered(run, seed, case, barrier):
    """On this machine the values may be right all the same. The last two are those of mix_probs.

    A correction's third is for what the grid prepares for quantised weights.
    """
    arguments = arguments_of(case, seed) | {"mix_probs": True}
    with pytest.raises(RuntimeError):
        run(arguments, "bfloat16", seed=seed, blocks=3, skipped_grid_barrier=barrier)


@pytest.mark.parametrize("reward_head", ["full", "embedding"])
def test_the_plain_path_is_ordered_by_its_grid_barriers(ordered, seed, reward_head):
    """Projections, attention, alpha, the heads, and two of mix_probs."""
    run = runner(ordered)
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "float32", B=3, V=70, S=150, reward_head=reward_head)
    arguments["mix_probs"] = True
    check_step(arguments, run(arguments, record=True, seed=seed), "float32")
    for barrier in range(6):
        with pytest.raises(RuntimeError, match=UNORDERED):
            run(arguments, record=True, seed=seed, skipped_grid_barrier=barrier)
