# SPDX-License-Identifier: Apache-2.0
"""The order of memory accesses in the CUDA step, on the host backend (csrc/testing/host_cuda).

The module dualhead_ordered reports every access of the kernels to global memory. A step stops if a
warp reads what another wrote without an order that a device guarantees: a barrier, or a counter
that is raised with release and read with an acquire fence. Bulk copies need a proxy fence as well.
"""

from __future__ import annotations

import native
import numpy as np
import numpy_decode as model
import pytest
from cuda_host import CLOSE, check_step, same_bits, stream_runner

# Projections before and after the grid barrier; hidden states that the grid prepares, and that it
# does not; one and two passes over objectives; the correction, whose rows the copy engine reads.
CASES = {
    "one request": dict(B=1, d=584, V=150, S=150, lengths=[140]),
    "late projections": dict(B=20, d=136, V=65),
    "objectives": dict(B=3, d=136, V=65, K=3),
    "prepared": dict(B=20, d=2048, V=20, quantized="int8"),
    "int4": dict(B=3, d=512, V=150, quantized="int4"),
    "embedding": dict(B=5, d=136, V=65, reward_head="embedding"),
    "embedding, 24 rows": dict(B=9, d=2048, V=20, reward_head="embedding"),
    "low rank": dict(B=5, d=136, V=65, reward_head="lowrank"),
}


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
    return arguments if format is None else model.quantized(rng, arguments, format, apart=16)


@pytest.mark.parametrize("case", CASES)
def test_every_read_is_ordered_behind_its_write(run, testing_module, seed, case):
    arguments = arguments_of(case, seed)
    for probs in (False, True):
        arguments["mix_probs"] = probs
        step = run(arguments, "bfloat16", record=True, seed=seed, blocks=3)
        check(arguments, step)
        plain = stream_runner(testing_module)(arguments, "bfloat16", record=True, blocks=3)
        assert not same_bits(step, plain)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("missing", ["releases", "acquires"])
def test_a_counter_without_release_or_acquire_orders_nothing(run, seed, missing, case):
    with pytest.raises(RuntimeError, match=r"reads what warp \d+ wrote, without an order"):
        run(arguments_of(case, seed), "bfloat16", seed=seed, blocks=3, **{missing: False})


@pytest.mark.parametrize("case", ["prepared", "embedding, 24 rows"])
def test_bulk_copies_of_what_the_grid_wrote_stand_behind_a_fence(run, ordered, seed, case):
    """Of hidden states for quantised weights, and of the rows of a correction."""
    arguments = arguments_of(case, seed)
    assert not ordered.stream_plan(arguments, "bfloat16")["resident"]
    check(arguments, run(arguments, "bfloat16", seed=seed))
    with pytest.raises(RuntimeError, match="without a proxy fence"):
        run(arguments, "bfloat16", seed=seed, proxy_fences=False)


def test_without_a_grid_barrier_something_is_not_ordered(run, seed):
    """Each of the step's barriers. On this machine the values may be right all the same."""
    arguments = arguments_of("one request", seed)
    for barrier in range(2):
        with pytest.raises(RuntimeError):
            run(arguments, "bfloat16", seed=seed, skipped_grid_barrier=barrier)
