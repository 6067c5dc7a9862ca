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
    logits = torch.full((B, V), torch.nan)
    references = logits._use_count()
    lm, reward = head_products("full", hidden, lm_weight, reward_weight, None, None, None, logits)
    assert lm.data_ptr() == logits.data_ptr()
    del lm
    assert logits._use_count() == references  # no reference is kept or lost
    torch.testing.assert_close(logits.double(), hidden.double() @ lm_weight.double().T, **CLOSE)
    exact = hidden.double() @ reward_weight.double().transpose(1, 2)
    torch.testing.assert_close(reward.double(), exact, **CLOSE)
    assert wide_products_on_the_cpu == [dtype] * (dtype != torch.float32) * (K + 1)


def corrected(hidden, lm_weight, down, up, bias, kind):
    """delta of each objective in float64, (K, B, V), without a bias of the vocabulary."""
    hidden, lm_weight, bias = hidden.double(), lm_weight.double(), bias.double()
    moved = torch.zeros(len(bias), len(hidden), bias.shape[1], dtype=torch.float64)
    if down is not None:
        moved += hidden @ down.double().mT @ up.double().mT
    return moved if kind == "lowrank" else (moved + bias[:, None]) @ lm_weight.T


@pytest.mark.parametrize("kind", ["embedding", "lowrank"])
@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_corrections_are_those_of_float64(
    head_products, wide_products_on_the_cpu, kind, r, dtype, seed
):
    """M h + c, and D h of a low-rank head, are rounded to the dtype of the weights."""
    generator = torch.Generator().manual_seed(seed)
    B, d, V, K = 7, 24, 33, 2

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    n = d if kind == "embedding" else V
    hidden, lm_weight, bias = normal(B, 2 * d)[:, :d], normal(V, d, scale=0.3), normal(K, n)
    down = up = None
    if r:
        down, up = normal(K, r, d, scale=0.3), normal(K, n, r, scale=0.5)
    logits = torch.full((B, V), torch.nan)
    lm, reward = head_products(kind, hidden, lm_weight, None, down, up, bias, logits)
    torch.testing.assert_close(lm.double(), hidden.double() @ lm_weight.double().T, **CLOSE)
    exact = corrected(hidden, lm_weight, down, up, bias, kind)
    error = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    assert reward.shape == (K, B, V) and reward.dtype == torch.float32
    torch.testing.assert_close(
        reward.double(), exact, rtol=0, atol=error * exact.abs().max() + 1e-9
    )
    products = {"embedding": 1, "lowrank": 1 + (K if r else 0)}[kind]
    products += (2 * K if kind == "embedding" else K) if r else 0
    assert len(wide_products_on_the_cpu) == products * (dtype != torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batches_beyond_one_pass_want_them(testing_module, dtype, seed):
    rng = np.random.default_rng(seed)
    for B, wanted in ((1, False), (64, False), (65, True), (300, True)):
        arguments = model.random_arguments(rng, dtype, B=B, gate="given")
        assert testing_module.wants_products(arguments, dtype) is wanted, B
        for kind in ("embedding", "lowrank"):
            other = model.random_arguments(rng, dtype, B=B, gate="given", reward_head=kind)
            assert testing_module.wants_products(other, dtype) is wanted, (B, kind)
        arguments["format"] = "int8"
        assert testing_module.wants_products(arguments, dtype) is False, B


# --- the launch around them ----------------------------------------------------------------------


def given_products(arguments, dtype):
    """The products, beside weights of NaN: nothing may read them."""
    wide = {n: model.widen(arguments[n], dtype) for n in _WEIGHTS if n in arguments}
    hidden, lm = model.widen(arguments["hidden"], dtype), wide["lm_weight"]
    kind = arguments.get("reward_head", "full")
    if kind == "full":
        reward = hidden @ wide["reward_weight"].transpose(0, 2, 1)
    else:
        inner = hidden @ wide["reward_down"].transpose(0, 2, 1)
        reward = inner @ wide["reward_up"].transpose(0, 2, 1)
    if kind == "embedding":
        reward = (reward + model.widen(arguments["reward_bias"], dtype)[:, None]) @ lm.T
        wide["reward_bias"] = None
    products = {"lm_product": hidden @ lm.T, "reward_product": reward}
    products = {name: value.astype(np.float32) for name, value in products.items()}
    nans = {n: np.full_like(arguments[n], model.narrow(np.nan, dtype)) for n in wide}
    return arguments | products | nans


_WEIGHTS = ("lm_weight", "reward_weight", "reward_down", "reward_up")


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


@pytest.mark.parametrize("kind", ["embedding", "lowrank"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_a_correction_s_step_is_the_float64_one(testing_module, seed, kind, dtype, mix_probs):
    """Neither the weights nor D and U are read, nor c of an embedding head: they hold NaN."""
    rng = np.random.default_rng(seed)
    sizes = dict(B=70, d=16, V=33, K=2, H=1, d_k=4, S=5, bias=True, reward_head=kind, r=3)
    arguments = model.random_arguments(rng, dtype, **sizes) | {"mix_probs": mix_probs}
    arguments["objective_weights"] = rng.standard_normal((70, 2)).astype(np.float32)
    arguments |= {"seeds": rng.integers(0, 2**40, 70), "draws": np.arange(70)}
    given = given_products(arguments, dtype)
    step = runner(testing_module)(given, dtype, record=True, seed=seed)
    check_step(arguments, step, dtype)


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
