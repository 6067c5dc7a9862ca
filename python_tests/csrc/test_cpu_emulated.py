# SPDX-License-Identifier: Apache-2.0
"""CPU kernels for bf16 products of AVX-512 and AMX, with emulated instructions, against float64.

Their sources are compiled as they are (csrc/testing/host_x86), so these tests run on any x86-64
machine. Real instructions may still be slower, or differ from their manual.
"""

from __future__ import annotations

import platform

import numpy as np
import numpy_decode as model
import pytest
from cuda_host import CLOSE, check_step, emulated_runner, same_bits

from dualhead_ext.quantization import FORMATS

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 kernels"
)
LEVELS = ["emulated_avx512bf16", "emulated_amx"]
HEADS = ["none", *FORMATS]
KINDS = [("full", 0), ("embedding", 5), ("lowrank", 17)]


@pytest.fixture(params=LEVELS)
def run(testing_module, request):
    assert set(LEVELS) == set(testing_module.emulated_levels())
    return emulated_runner(testing_module, request.param)


def arguments_of(rng, name, **sizes):
    options = {"B": 2, "d": 128, "V": 67, "H": 2, "d_k": 8, "S": 5, "bias": True} | sizes
    arguments = model.random_arguments(rng, "bfloat16", **options)
    return arguments if name == "none" else model.quantized(rng, arguments, name, apart=3)


def close(reward_head):
    """An embedding head rounds the moved hidden state to bf16 before the LM head."""
    return {"rtol": 0, "atol": 0.12} if reward_head == "embedding" else CLOSE


SIZES = {  # int4 takes d rounded up to its groups
    "least": dict(B=1, d=1, V=1, H=1, d_k=1, S=1, lengths=[0]),
    "one row": dict(B=1, d=333, V=150),
    "odd": dict(B=3, d=77, V=65, K=2),
    "a tile": dict(B=16, d=256, V=64, K=2),
    "two tiles": dict(B=17, d=130, V=41, K=3),
    "three tiles": dict(B=35, d=96, V=48),
    "four tiles": dict(B=64, d=160, V=33),
    "two blocks": dict(B=69, d=34, V=20),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_step_is_the_float64_one(run, seed, name, size):
    turn = list(HEADS).index(name) + list(SIZES).index(size)
    reward_head, r = KINDS[turn % 3]
    rng = np.random.default_rng(seed)
    sizes = dict(SIZES[size])
    if name == "int4":
        sizes["d"] = -(-sizes["d"] // 128) * 128
    arguments = arguments_of(rng, name, reward_head=reward_head, r=r, **sizes)
    arguments["mix_probs"] = bool(turn // 3 % 2)
    step = run(arguments, "bfloat16", record=True, ranges=bool(turn % 2))
    check_step(arguments, step, "bfloat16", close(reward_head))


@pytest.mark.parametrize("name", HEADS)
def test_every_input_meets_its_own_weight(run, seed, name):
    """Each row of hidden states holds a single 1, so that the logits are the stored values."""
    d = 256
    rng = np.random.default_rng(seed)
    arguments = arguments_of(rng, name, d=d, B=64, V=40, gate="given", bias=False)
    arguments["alpha"] = np.zeros(64, np.float32)
    if name in ("int8", "fp8"):
        arguments["lm_scale"] = np.ones_like(arguments["lm_scale"])
    weights = model.head_weight(arguments, "lm", "bfloat16").reshape(40, d)
    for first in range(0, d, 64):
        hidden = np.zeros((64, d), np.float32)
        hidden[np.arange(64), np.arange(64) + first] = 1
        arguments["hidden"] = model.narrow(hidden, "bfloat16")
        logits = run(arguments, "bfloat16").logits
        np.testing.assert_allclose(logits, weights[:, first : first + 64].T, rtol=2e-7)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("mix_probs", [False, True])
@pytest.mark.parametrize("reward_head", ["full", "embedding"])
def test_a_row_depends_on_nothing_but_itself(run, seed, name, mix_probs, reward_head):
    rng = np.random.default_rng(seed)
    sizes = {"B": 64, "d": 256, "V": 37, "reward_head": reward_head}
    arguments = arguments_of(rng, name, **sizes) | {"mix_probs": mix_probs}
    whole = run(arguments, "bfloat16")
    assert same_bits(run(arguments, "bfloat16", ranges=True), whole) == []
    for batch in (1, 2, 5, 16, 17, 33):
        chosen = rng.permutation(64)[:batch]
        part = run(rows(arguments, chosen), "bfloat16")
        for i, b in enumerate(chosen):
            for field in ("logits", "alpha", "gate_logit", "token", "logprob", "status"):
                got, expected = getattr(part, field)[i], getattr(whole, field)[b]
                assert got.tobytes() == expected.tobytes(), (batch, b, field)


def rows(arguments, chosen):
    """The arguments with only some of their requests."""
    own = ("hidden", "cache_k", "cache_u", "cache_valid", "cache_length", "gate_logit")
    return {k: v[chosen].copy() if k in own else v for k, v in arguments.items()}


def test_a_broken_row_leaves_its_neighbours_alone(run, seed):
    rng = np.random.default_rng(seed)
    arguments = arguments_of(rng, "none", B=20, d=96)
    whole = run(arguments, "bfloat16")
    broken = arguments["hidden"].copy()
    broken[7] = model.narrow(np.full(96, np.nan), "bfloat16")
    broken[11, 3] = model.narrow(np.array(np.inf), "bfloat16")
    step = run(arguments | {"hidden": broken}, "bfloat16")
    assert step.status[[7, 11]].tolist() == [1, 1]
    kept = [b for b in range(20) if b not in (7, 11)]
    assert step.logits[kept].tobytes() == whole.logits[kept].tobytes()
    assert (step.status[kept] == 0).all()
