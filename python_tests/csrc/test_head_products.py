# SPDX-License-Identifier: Apache-2.0
"""Large batches, whose products the CUDA step computes with torch's GEMMs.

The tests run csrc/head_products.h on CPU tensors, and the launch with given products on the host
backend.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import numpy_decode as model
import pytest
import torch
from build_backend import libraries, toolchain
from cuda_host import CLOSE, check_row, check_step, runner, same_bits

HERE = Path(__file__).resolve().parents[1]


# --- the GEMMs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_products(tmp_path_factory):
    tools, library = libraries.find_tools(), tmp_path_factory.mktemp("op") / "head_products.so"
    subprocess.run(
        [
            *tools.cxx, *toolchain.CXX_FLAGS, *libraries._binding_flags(tools.torch), "-O0",
            f"-I{HERE.parent / 'csrc'}", "-shared", str(HERE / "head_products_op.cpp"),
            f"-L{tools.torch.lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    torch.ops.load_library(str(library))
    return torch.ops.dualhead_test.head_products


@pytest.fixture
def wide_products_on_the_cpu():
    """A CPU version of mm.dtype_out, which torch has for CUDA only, with the schema's dtypes."""
    seen = []

    def mm(a, b, out_dtype, *, out):
        assert a.dtype == b.dtype and out.dtype == out_dtype == torch.float32
        seen.append(a.dtype)
        return out.copy_(a.float() @ b.float())

    registered = torch.library.Library("aten", "IMPL")
    registered.impl("mm.dtype_out", mm, "CPU")
    yield seen
    registered._destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_products_are_those_of_float64(
    head_products, wide_products_on_the_cpu, dtype, strided, seed
):
    generator = torch.Generator().manual_seed(seed)
    B, d, V, K = 7, 24, 33, 3
    make = [torch.randn(*s, generator=generator).to(dtype) for s in ((B, d), (V, d), (K, V, d))]
    if strided:  # rows of a wider matrix, like a slice of a fused weight
        make = [torch.cat([x, x * 2], -1)[..., :d] for x in make]
    hidden, lm_weight, reward_weight = make
    lm, reward = torch.full((B, V), torch.nan), torch.full((K, B, V), torch.nan)
    references = [x._use_count() for x in (lm, reward)]
    head_products(hidden, lm_weight, reward_weight, lm, reward)
    assert [x._use_count() for x in (lm, reward)] == references  # no reference is kept or lost
    torch.testing.assert_close(lm.double(), hidden.double() @ lm_weight.double().T, **CLOSE)
    exact = hidden.double() @ reward_weight.double().transpose(1, 2)
    torch.testing.assert_close(reward.double(), exact, **CLOSE)
    assert wide_products_on_the_cpu == [dtype] * (dtype != torch.float32) * (K + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batches_beyond_one_pass_want_them(testing_module, dtype, seed):
    rng = np.random.default_rng(seed)
    for B, wanted in ((1, False), (64, False), (65, True), (300, True)):
        arguments = model.random_arguments(rng, dtype, B=B, gate="given")
        assert testing_module.wants_products(arguments, dtype) is wanted, B
        arguments["format"] = "int8"
        assert testing_module.wants_products(arguments, dtype) is False, B


# --- the launch around them ----------------------------------------------------------------------


def given_products(arguments, dtype):
    """The products, beside weights of NaN: nothing may read them."""
    hidden = model.widen(arguments["hidden"], dtype)
    lm, reward = (model.widen(arguments[f"{name}_weight"], dtype) for name in ("lm", "reward"))
    products = {
        "lm_product": (hidden @ lm.T).astype(np.float32),
        "reward_product": (hidden @ reward.transpose(0, 2, 1)).astype(np.float32),
    }
    names = ("lm_weight", "reward_weight")
    nans = {n: np.full_like(arguments[n], model.narrow(np.nan, dtype)) for n in names}
    return arguments | products | nans


SIZES = {  # remainders of chunks of 32 entries and of tiles of 8 rows, and more than 64 rows
    "one": dict(B=1, d=1, V=1, H=1, d_k=1, S=1, lengths=[0]),
    "odd": dict(B=3, d=33, V=65, K=2, H=3, d_k=5, S=11),
    "aligned": dict(B=9, d=32, V=64, K=3, H=2, d_k=8, S=16),
    "beyond a pass": dict(B=70, d=16, V=33, K=2, H=1, d_k=4, S=5),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_step_is_the_float64_one(testing_module, seed, dtype, size, mix_probs):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, dtype, **SIZES[size], bias=size != "aligned")
    B, K = len(arguments["hidden"]), len(arguments["reward_weight"])
    arguments |= {"mix_probs": mix_probs, "logit_scale": 0.75, "logit_softcap": 20.0}
    if K > 2:
        arguments["objective_weights"] = rng.standard_normal((B, K)).astype(np.float32)
    if size != "one":
        arguments |= {"seeds": rng.integers(0, 2**40, B), "draws": np.arange(B)}
    given = given_products(arguments, dtype)
    run = runner(testing_module)
    step = run(given, dtype, record=True, seed=seed)
    check_step(arguments, step, dtype)
    other = run(given, dtype, record=True, seed=seed + 1, blocks=1, threads=256, dirt=0)
    assert not same_bits(step, other)


def test_a_head_that_a_row_does_not_need_may_be_anything(testing_module, seed):
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "bfloat16", B=3, gate="given")
    arguments["alpha"] = np.array([0, 1, 0.5], np.float32)
    given = given_products(arguments, "bfloat16")
    given["reward_product"][:, 0] = np.nan
    given["lm_product"][1] = np.inf
    step = runner(testing_module)(given, "bfloat16", seed=seed)
    check_row(arguments, step, "bfloat16", 0)
    check_row(arguments, step, "bfloat16", 1)
    given["reward_product"][0, 2, 1] = np.nan
    assert runner(testing_module)(given, "bfloat16", seed=seed).status.tolist() == [0, 0, 1]


@pytest.mark.parametrize("barrier", [0, 1, 2, 3, 4, 5])
def test_a_missing_barrier_shows(testing_module, seed, barrier):
    """Grid barriers, in order: project, attend, weigh, products, normalizers, mixture."""
    rng = np.random.default_rng(seed)
    arguments = model.random_arguments(rng, "bfloat16", B=9, d=24, V=200, H=3, d_k=5, S=140)
    arguments["mix_probs"] = barrier > 3
    given = given_products(arguments, "bfloat16")
    run = runner(testing_module)
    expected = run(given, "bfloat16", seed=seed, blocks=4)
    broken = [
        run(given, "bfloat16", seed=seed + i, blocks=4, skipped_grid_barrier=barrier)
        for i in range(4)
    ]
    assert any(same_bits(step, expected) for step in broken)
