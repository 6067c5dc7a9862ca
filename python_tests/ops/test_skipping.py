# SPDX-License-Identifier: Apache-2.0
"""``skip_threshold``: which alpha counts as 0 or 1, and bounds on the change that it makes.

A head that no row needs is not read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy_decode
import pytest
import torch
from decode_cases import (
    CPU_ISAS,
    assert_same_bits,
    forced_isa,
    in_double,
    make_case,
    rows,
    run,
)

import dualhead_ext as dh
from dualhead_ext import ops, reference

HERE = Path(__file__).resolve().parents[1]
F32, BF16 = torch.float32, torch.bfloat16
MIXES = pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
# alpha, threshold, the alpha that is used. They lie below, at and above both limits; 1 - 0.9375 is
# exact.
RULE = [
    (0.03, 0.0625, 0.0),
    (0.0625, 0.0625, 0.0625),
    (0.07, 0.0625, 0.07),
    (0.93, 0.0625, 0.93),
    (0.9375, 0.0625, 0.9375),
    (0.95, 0.0625, 1.0),
    (0.5, 0.5, 0.5),
    (0.4999, 0.5, 0.0),
    (0.5001, 0.5, 1.0),
    (1e-30, 0.0, 1e-30),
    (0.0, 0.0, 0.0),
    (1.0, 0.0, 1.0),
]


def rule_case(seed: int, dtype: torch.dtype, mix_probs: bool) -> tuple[dict, torch.Tensor]:
    alpha, threshold, used = (torch.tensor(column) for column in zip(*RULE, strict=True))
    case = make_case(seed, len(RULE), 70, 131, 2, dtype, mix_probs=mix_probs, sample=True)
    return case | {"alpha": alpha, "skip_threshold": threshold}, used


@pytest.mark.parametrize("isa", CPU_ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@MIXES
def test_a_step_is_the_one_with_the_alpha_that_is_used(isa, dtype, mix_probs, seed):
    """The rule itself, and the same bits as with the rounded alpha.

    A row is tested alone, where a head is skipped, and beside rows that need both heads.
    """
    case, used = rule_case(seed, dtype, mix_probs)
    plain = {name: value for name, value in case.items() if name != "skip_threshold"}
    with forced_isa(isa):
        together, state = run(ops.decode_step, case)
        assert torch.equal(together.alpha, used)
        expected, expected_state = run(ops.decode_step, plain | {"alpha": used})
        assert_same_bits(together, expected)
        assert_same_bits(state, expected_state)
        for b in range(len(RULE)):
            alone, _ = run(ops.decode_step, rows(case, [b]))
            assert_same_bits(alone, type(alone)(*(value[[b]] for value in expected[:6]), alone[6]))
    truth, _ = run(reference.decode_step, in_double(case))
    assert torch.equal(truth.alpha.float(), used)
    assert (together.logits - truth.logits).abs().max() < (1e-4 if dtype == F32 else 1e-3)


def test_the_rule_comes_after_strength_and_passes_nan():
    """Above 1 too: alpha slightly above 1 counts as 1, and alpha far above 1 is kept."""
    logit = torch.tensor([0.0, 0.0, torch.nan, 3.0, 0.0, 0.0])
    strength = torch.tensor([0.1, 1.95, 1.0, 1.0, 2.1, 3.4])
    threshold = torch.full((6,), 0.06)
    weight = reference.mixing_weight(logit, None, strength, threshold)
    assert weight.isnan().tolist() == [False, False, True, False, False, False]
    assert weight[[0, 1, 3, 4, 5]].tolist() == pytest.approx([0.0, 1.0, 1.0, 1.0, 1.7])
    case = make_case(0, 6, 9, 20, gate="logit", strength=strength, skip_threshold=threshold)
    got, _ = run(ops.decode_step, case | {"gate_logit": logit})
    assert torch.equal(torch.nan_to_num(got.alpha, 7.0), torch.nan_to_num(weight, 7.0))
    assert got.status.tolist() == [0, 0, 1, 0, 0, 0]


def test_the_cuda_kernels_rule(testing_module, seed):
    alpha, threshold, used = (np.array(column, np.float32) for column in zip(*RULE, strict=True))
    B, V = len(RULE), 37
    case = numpy_decode.random_arguments(
        np.random.default_rng(seed), "float32", B=B, V=V, gate="given"
    )
    case |= {
        "alpha": alpha,
        "skip_threshold": threshold,
        "out_logits": np.empty((B, V), np.float32),
    }
    case |= {f"out_{name}": np.empty(B, np.float32) for name in ("alpha", "gate_logit", "logprob")}
    case |= {"out_token": np.empty(B, np.int64), "out_status": np.empty(B, np.int32)}
    assert testing_module.decode_step(case, "float32") == "cudaSuccess"
    assert np.array_equal(case["out_alpha"], used) and not case["out_status"].any()
    for b in range(B):
        expected = numpy_decode.row_logits(case, "float32", b, used[b])
        np.testing.assert_allclose(case["out_logits"][b], expected, rtol=2e-5, atol=2e-5)


# Each head in turn is in protected pages, and reading them kills the process.
UNREADABLE = """
import ctypes, mmap, sys, torch
from decode_cases import CPU_ISAS, forced_isa, make_case
from dualhead_ext import ops
from dualhead_ext.quantization import FORMATS, quantize

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def unreadable(value):
    size = -(-value.numel() * value.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    block = mmap.mmap(-1, size)
    kept.append(block)
    raw = torch.frombuffer(block, dtype=torch.uint8, count=value.numel() * value.element_size())
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert libc.mprotect(ctypes.c_void_p(address), size, 0) == 0
    return raw.view(value.dtype).view(value.shape)

skipped = {"reward": [0.03, 0.0], "lm": [0.97, 1.0]}
for isa in CPU_ISAS:
    for name in ("fp32", "bf16", *FORMATS):
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        for mix_probs in (False, True):
            for head, alpha in skipped.items():
                case = make_case(1, 2, 128, 131, 2, dtype, mix_probs=mix_probs)
                case |= {"alpha": torch.tensor(alpha), "skip_threshold": torch.full((2,), 0.05)}
                for part in ("lm", "reward") if name in FORMATS else ():
                    q, scale = quantize(case[f"{part}_weight"], name)
                    case |= {f"{part}_weight": q, f"{part}_scale": scale}
                with forced_isa(isa), torch.no_grad():
                    expected = ops.decode_step(**case)
                    case["cache_length"] -= 1
                    case[f"{head}_weight"] = unreadable(case[f"{head}_weight"])
                    got = ops.decode_step(**case)
                assert torch.equal(got.logits, expected.logits) and got.status.eq(0).all()
print("read one head", flush=True)
case["alpha"][0] = 0.5
ops.decode_step(**case)
print("read both")
"""


def test_a_head_that_no_row_listens_to_is_not_read():
    """In a child process. It must be killed in the last step, in which one row needs the head."""
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parent]))},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "read one head\n" and done.returncode < 0, (done.returncode, done.stderr)


# --- what it may change ---------------------------------------------------------------------------


def trained_like_head(seed: int, mix: str) -> dh.DualHead:
    """A head in float64 whose gate and reward head differ from those at the start."""
    torch.manual_seed(seed)
    config = dh.DualHeadConfig(
        hidden_size=24, vocab_size=60, gate_num_heads=2, gate_head_dim=4, mix=mix
    )
    head = dh.DualHead(config).double().requires_grad_(False)
    for parameter in (*head.gate.parameters(), head.reward_head.weight):
        parameter += torch.randn_like(parameter)
    return head


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_the_error_is_within_its_bound(mix, threshold, seed):
    """logits: |z - z_exact| <= threshold |z_RM - z_LM|, elementwise. probs: total variation <=
    threshold.

    Both bounds are nearly reached.
    """
    head, hidden = trained_like_head(seed, mix), torch.randn(40, 30, 24, dtype=torch.float64)
    exact, got = head(hidden), head(hidden, skip_threshold=threshold)
    changed = got.alpha != exact.alpha
    assert changed.any() and (got.alpha[changed] * (1 - got.alpha[changed]) == 0).all()
    assert torch.equal(got.logits[~changed], exact.logits[~changed])
    if mix == "logits":
        gap = (head(hidden, alpha=1.0).logits - head(hidden, alpha=0.0).logits).abs()
        share = ((got.logits - exact.logits).abs() / gap)[changed]
    else:
        share = (got.logits.exp() - exact.logits.exp()).abs().sum(-1)[changed] / 2
    assert share.max() <= threshold * (1 + 1e-9)
    if mix == "logits":
        assert share.max() > 0.8 * threshold


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_prefill_step_and_full_pass_agree(mix, seed):
    head, hidden = trained_like_head(seed, mix), torch.randn(3, 8, 24, dtype=torch.float64)
    controls = {"skip_threshold": torch.tensor([0.0, 0.2, 0.5]), "strength": 0.9}
    full = head(hidden, **controls)
    assert full.alpha[2].mul(1 - full.alpha[2]).eq(0).all() and full.alpha[0].ne(0).all()
    cache = head.new_cache(3, 8)
    out = head.prefill(hidden[:, :4], cache, logits_to_keep=0, **controls)
    torch.testing.assert_close(out.alpha, full.alpha[:, :4])
    for t in range(4, 8):
        out = head.step(hidden[:, t], cache, **controls)
        torch.testing.assert_close(out.alpha, full.alpha[:, t])
        torch.testing.assert_close(out.logits, full.logits[:, t])


def test_max_kl_has_the_last_word():
    head, hidden = trained_like_head(3, "logits"), torch.randn(2, 5, 24, dtype=torch.float64)
    capped = head(hidden, skip_threshold=0.5, max_kl=0.01)
    rounded = head(hidden, skip_threshold=0.5)
    assert (capped.alpha <= rounded.alpha).all() and capped.alpha.mul(1 - capped.alpha).any()


@pytest.mark.parametrize("wrong", [-0.1, 0.6, float("nan"), "0.1"])
def test_refusals(wrong):
    head, hidden = trained_like_head(4, "logits"), torch.randn(1, 2, 24, dtype=torch.float64)
    cache = head.new_cache(1, 4)
    calls = {
        "DualHead.forward": lambda: head(hidden, skip_threshold=wrong),
        "DualHead.prefill": lambda: head.prefill(hidden, cache, skip_threshold=wrong),
        "DualHead.step": lambda: head.step(hidden[:, 0], cache, skip_threshold=wrong),
    }
    for operator, call in calls.items():
        kind = TypeError if wrong == "0.1" else ValueError
        with pytest.raises(kind, match=rf"{operator}: skip_threshold must be a number in \[0"):
            call()
    assert cache.columns == 0
    case = make_case(0, 2, 9, 20, gate="logit")
    with pytest.raises(ValueError, match=r"skip_threshold must be \(2,\), got \(3,\)"):
        ops.decode_step(**case, skip_threshold=torch.zeros(3))
