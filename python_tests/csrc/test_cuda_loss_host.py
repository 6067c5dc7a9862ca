# SPDX-License-Identifier: Apache-2.0
"""The loss's CUDA kernel, compiled from the same source for the host backend.

These tests cover what is specific to CUDA: the shapes of blocks, alignment, barriers and launches.
test_loss_rows.py compares the values with float64, for every option and for extreme values, beside
the CPU's kernels. test_cuda_loss.py covers what only a GPU can show.
"""

import numpy as np
import pytest
import torch
from decode_cases import bits
from loss_rows_cases import OPTIONS, in_double, problem, run
from loss_rows_host import on_the_host_backend

from dualhead_ext.loss.terms import LossOptions

# Sizes for blocks of one warp, one and a partial warp, several warps, and all 512 threads, with one
# round and with more.
VOCABULARIES = [1, 31, 128, 129, 515, 2048, 2049, 6151]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(bits(a[k]), bits(b[k])) for k in a)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_every_shape_of_block(V, name, seed):
    """Against float64. The bound is that of fp32 sums of this length."""
    p, options = problem(seed, 2, V), LossOptions(**OPTIONS[name])
    exact = run(in_double(p), options)
    with on_the_host_backend():
        got = run(p, options)
    for key, value in exact.items():
        error = (got[key] - value).abs().max() / value.abs().max().clamp(min=1.0)
        assert error <= 2e-6, (key, error)


@pytest.mark.parametrize("name", OPTIONS)
def test_bits_do_not_depend_on_the_schedule(name, seed):
    p, options = problem(seed, 3, 700), LossOptions(**OPTIONS[name])
    with on_the_host_backend():
        expected = run(p, options)
    for schedule in (1, 2, seed | 1, seed & ~1):
        with on_the_host_backend(seed=schedule):
            assert same_bits(run(p, options), expected), schedule


@pytest.mark.parametrize("name", ["logits", "post_probs"])
@pytest.mark.parametrize("V", [64, 67, 2053])
def test_bits_do_not_depend_on_how_a_row_lies(V, name, seed):
    """A row's address may have any remainder modulo 16.

    Each row has memory of its own. For odd V, the rows of a batch have different remainders too.
    """
    p, options = problem(seed, 4, V), LossOptions(**OPTIONS[name])

    def at(z, offset):
        moved = torch.empty(z.numel() + 8)
        start = -(moved.data_ptr() // 4) % 4 + offset
        view = moved[start : start + z.numel()].view(z.shape).copy_(z)
        assert view.data_ptr() % 16 == 4 * offset
        return view

    with on_the_host_backend():
        whole = run(p, options)
        for i in range(4):
            row = {k: v[i : i + 1] for k, v in p.items()}
            expected = {k: v[i : i + 1] for k, v in whole.items()}
            for lm, rm in ((0, 0), (1, 1), (0, 2), (3, 0)):
                # run() clones its arguments, and a clone would be aligned.
                z_lm, z_rm = Unmoved(at(row["z_lm"], lm)), Unmoved(at(row["z_rm"], rm))
                got = run(row | {"z_lm": z_lm, "z_rm": z_rm}, options)
                assert same_bits(got, expected), (i, lm, rm)


class Unmoved:
    """A tensor whose clone is itself."""

    def __init__(self, tensor):
        self.tensor = tensor

    def clone(self):
        return self.tensor


# Forward and backward barriers have the same numbers within a launch. Barrier 0 publishes what one
# thread found. The next ones belong to the reductions: one for each softmax, and one for the gate's
# sum.
@pytest.mark.parametrize(
    ("name", "barrier", "needed"),
    [
        ("logits", 0, True),
        ("logits", 1, True),
        ("logits", 2, True),
        ("logits", 3, False),  # there is no fourth barrier
        ("probs", 0, True),
        ("probs", 1, True),
        ("probs", 2, True),
    ],
)
def test_a_missing_barrier_is_seen(name, barrier, needed, seed):
    p, options = problem(seed, 2, 300), LossOptions(**OPTIONS[name])
    with on_the_host_backend():
        expected = run(p, options)

    def differs(schedule):
        with on_the_host_backend(seed=schedule, skipped_block_barrier=barrier):
            try:
                return not same_bits(run(p, options), expected)
            except RuntimeError as error:
                assert "deadlock" in str(error) or "diverged" in str(error)
                return True

    assert any(differs(schedule) for schedule in range(8)) == needed


def test_poisoned_shared_memory_leaves_no_trace(seed):
    """The backend fills shared memory with NaN before each block.

    A small block has fewer warps than slots; the slots of missing warps are never read.
    """
    for V in (3, 130, 900):
        p = problem(seed, 2, V)
        for name in OPTIONS:
            with on_the_host_backend():
                found = run(p, LossOptions(**OPTIONS[name]))
            assert all(v.isfinite().all() for v in found.values()), (V, name)


def test_a_refused_launch_is_reported(testing_module, seed):
    p = {k: v.numpy() for k, v in problem(seed, 2, 9).items()}
    p |= {"mix_probs": False, "logit_scale": 1.0, "logit_softcap": 0.0}
    p |= {"normalizers": np.full((2, 2), 7.0), "mixed": np.full(2, 7, np.float32)}
    before = {k: v.copy() for k, v in p.items() if isinstance(v, np.ndarray)}
    for backward in (False, True):
        assert testing_module.loss_rows(p, backward, device=1) == "cudaErrorInvalidDevice"
    assert all(np.array_equal(p[k], v) for k, v in before.items())
    assert testing_module.loss_rows(p, False, device=0) == "cudaSuccess"


def test_no_rows_launch_nothing():
    with on_the_host_backend():
        found = run(problem(0, 0, 9), LossOptions())
    assert all(v.numel() == 0 for v in found.values())
