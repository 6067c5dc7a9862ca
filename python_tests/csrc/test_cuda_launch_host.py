# SPDX-License-Identifier: Apache-2.0
"""What the CUDA step asks a device before it launches, on the host backend.

It must take the path of the architecture that the code was compiled for. It needs a fence before
bulk copies of data that the grid wrote.
"""

from __future__ import annotations

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import check_step, same_bits, stream_runner

NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice


@pytest.fixture
def run(testing_module):
    return stream_runner(testing_module)


@pytest.fixture
def arguments(seed):
    """int8 heads, and too many batch rows for shared memory, so that the grid prepares hidden
    states.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(B=20, d=2048, V=20, H=2, d_k=8, S=5)
    arguments = model.random_arguments(rng, "bfloat16", aligned=True, **sizes)
    return model.quantized(rng, arguments, "int8", apart=16)


def test_code_for_an_older_architecture_takes_its_own_path(run, seed, arguments):
    """The driver may compile sm_80's PTX for Hopper, but that code has no bulk copies.

    A kernel with bulk copies would be empty there. The host backend reports this at the first copy.
    """
    step = run(arguments, "bfloat16", record=True, compute_major=9, compiled_major=8, seed=seed)
    check_step(arguments, step, "bfloat16")
    newest = run(arguments, "bfloat16", record=True, compute_major=9, seed=seed)
    assert not same_bits(step, newest)


def test_a_device_without_code_is_refused_by_name(testing_module, run, arguments):
    for compute_major in (8, 9):
        with pytest.raises(AssertionError, match="cudaErrorNoKernelImageForDevice"):
            run(arguments, "bfloat16", compute_major=compute_major, compiled_major=-1)
    text = testing_module.error_text(NO_IMAGE)
    assert "compiled for sm_80 sm_90 sm_100, device 0 is sm_90" in text
    assert "sm_" not in testing_module.error_text(1)


def test_bulk_copies_of_prepared_hidden_states_stand_behind_a_fence(
    testing_module, run, seed, arguments
):
    assert not testing_module.stream_plan(arguments, "bfloat16")["resident"]
    missing = {}
    for engine in (8, 9):
        step = run(arguments, "bfloat16", seed=seed, compute_major=engine)
        check_step(arguments, step, "bfloat16")
        orderings = testing_module.orderings().items()
        [missing[engine]] = [place for place, (what, _) in orderings if what == "proxy fence"]
    with pytest.raises(RuntimeError, match="without a proxy fence"):
        run(arguments, "bfloat16", seed=seed, missing=missing[9])
    # Copies of 16 bytes per lane use the ordinary path, which needs no fence.
    run(arguments, "bfloat16", seed=seed, missing=missing[8], compute_major=8)
