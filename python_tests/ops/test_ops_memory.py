# SPDX-License-Identifier: Apache-2.0
"""Memory that the fused CPU step uses: its cache, tensors of any layout, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_cases import (
    STATE,
    assert_same_bits,
    bits,
    in_double,
    make_case,
    rows,
    run,
)

from dualhead_ext import ops, reference

HERE = Path(__file__).resolve().parents[1]


def test_cache_gets_one_column_and_nothing_else_changes(isa, dtype, seed):
    case = make_case(seed, 6, 50, 70, 1, dtype, H=3, d_k=7, S=9)
    case["new_valid"] = torch.tensor([True, False, True, False, True, True])
    _, state = run(ops.decode_step, case)
    _, expected = run(reference.decode_step, in_double(case))
    length = case["cache_length"]
    new = torch.arange(9) == length[:, None]
    for name in ("cache_k", "cache_u", "cache_valid"):
        old = case[name].movedim(1, 2) if case[name].dim() > 2 else case[name]
        now = state[name].movedim(1, 2) if state[name].dim() > 2 else state[name]
        assert torch.equal(now[~new], old[~new]), name
    assert torch.equal(state["cache_length"], length + 1)
    assert torch.equal(state["cache_valid"], expected["cache_valid"])
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for name, tolerance in (("cache_k", unit), ("cache_u", 2.0**-20)):
        error = (state[name].double() - expected[name]).abs()
        assert (error <= tolerance * (1 + expected[name].abs())).all(), name


def test_steps_in_a_row_equal_the_reference(isa, dtype, seed):
    """40 steps from an empty cache over several blocks of columns, with ragged rows and padding."""
    case = make_case(seed, 4, 40, 60, 1, dtype, H=2, d_k=6, S=140, record_attention=True)
    for name in STATE[:4]:
        case[name] = torch.zeros_like(case[name])
    case["cache_length"] = torch.tensor([0, 1, 63, 98], dtype=torch.int32)
    case["cache_valid"][:] = True
    steps = {"ours": ops.decode_step, "eager": reference.decode_step}
    states = {name: {k: v.clone() for k, v in case.items() if k in STATE} for name in steps}
    truth = {k: v.clone() for k, v in in_double(case).items() if k in STATE}
    errors = {name: [] for name in steps}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(40):
        case["hidden"] = torch.randn(4, 40, generator=generator).to(dtype)
        case["new_valid"] = torch.rand(4, generator=generator) > 0.3
        with torch.no_grad():
            exact = reference.decode_step(**in_double(case) | truth)
            for name, step in steps.items():
                got = step(**case | states[name])
                errors[name] += [got.gate_logit - exact.gate_logit]
                errors[name] += [(got.attention - exact.attention).flatten()]
    ours, eager = (torch.cat(errors[name]) for name in steps)
    assert torch.equal(states["ours"]["cache_length"], truth["cache_length"])
    assert torch.equal(states["ours"]["cache_valid"], truth["cache_valid"])
    assert ours.norm() <= 1.1 * eager.norm() and ours.abs().max() <= 2 * eager.abs().max()


def test_recorded_attention(isa, seed):
    case = make_case(seed, 5, 30, 20, H=3, d_k=4, S=150, record_attention=True)
    case["cache_length"] = torch.tensor([0, 5, 64, 100, 149], dtype=torch.int32)
    got, state = run(ops.decode_step, case)
    truth, _ = run(reference.decode_step, in_double(case))
    visible = (torch.arange(150) < state["cache_length"][:, None]) & state["cache_valid"]
    assert (got.attention[~visible[:, None].expand(-1, 3, -1)] == 0).all()
    assert (got.attention.sum(-1) - 1).abs().max() < 1e-6
    assert (got.attention - truth.attention).abs().max() < 1e-6
    without, _ = run(ops.decode_step, case | {"record_attention": False, "return_logits": False})
    assert without.attention.shape == without.logits.shape == (0,)
    assert_same_bits(without._replace(attention=got.attention, logits=got.logits), got)


def test_a_position_that_sees_nothing_gets_the_bias(isa, dtype, seed):
    case = make_case(seed, 3, 20, 30, 1, dtype, new_valid=torch.zeros(3, dtype=torch.bool))
    case["cache_valid"][:] = False
    got, _ = run(ops.decode_step, case | {"record_attention": True})
    assert torch.equal(got.gate_logit, case["gate_bias"].expand(3))
    assert torch.equal(got.alpha, torch.sigmoid(case["gate_bias"].double()).float().expand(3))
    assert (got.attention == 0).all() and got.status.eq(0).all()


def test_what_is_not_visible_is_not_read(isa, dtype, seed):
    """NaN in columns that are padding or not filled changes no bit."""
    case = make_case(seed, 4, 30, 40, 1, dtype, S=100, record_attention=True)
    expected, _ = run(ops.decode_step, case)
    hidden = (torch.arange(100) >= case["cache_length"][:, None]) | ~case["cache_valid"]
    # The new column is overwritten in any case
    hidden[torch.arange(4), case["cache_length"].long()] = False
    for name in ("cache_k", "cache_u"):
        case[name].movedim(2, 1)[hidden] = torch.nan
    got, _ = run(ops.decode_step, case)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("length", [9, 10, 2**31 - 1, -1, -(2**31)])
def test_full_cache(isa, dtype, seed, length):
    """The status is 2, nothing of the row is written, and its neighbours are not changed.

    An impossible length counts as a full cache.
    """
    case = make_case(seed, 4, 33, 70, 1, dtype, S=9, sample=True, record_attention=True)
    case["cache_length"][:] = torch.tensor([3, length, 8, length])
    got, state = run(ops.decode_step, case)
    assert got.status.tolist() == [0, 2, 0, 2]
    for row in (1, 3):
        assert got.token[row] == 0 and (got.attention[row] == 0).all()
        for name in ("logits", "alpha", "gate_logit", "logprob"):
            assert getattr(got, name)[row].isnan().all(), name
        for name in STATE:
            assert torch.equal(bits(state[name][row]), bits(case[name][row])), name
    alone, alone_state = run(ops.decode_step, rows(case, [0, 2]))
    assert_same_bits(type(got)(*(value[[0, 2]] for value in got)), alone)
    assert_same_bits({name: value[[0, 2]] for name, value in state.items()}, alone_state)


def test_nothing_outside_the_tensors_is_written_or_read(isa, dtype, seed):
    """Caches lie between guard bands.

    Weights, hidden states and biases have NaN around every row.
    """
    case = make_case(seed, 3, 45, 70, 2, dtype, bias=True, sample=True)
    expected, expected_state = run(ops.decode_step, case)
    guarded, bands = dict(case), []
    for name in STATE:
        value = case[name]
        filler = 7 if not value.is_floating_point() else -1e30
        block = torch.full((value.numel() + 128,), filler).to(value.dtype)
        block[64:-64] = value.flatten()
        guarded[name] = block[64:-64].view(value.shape)
        bands.append((name, block, block.clone()))
    for name in ("hidden", "lm_weight", "reward_weight"):
        value = case[name]
        wide = torch.full((*value.shape[:-1], value.shape[-1] + 9), torch.nan, dtype=dtype)
        wide[..., 5:-4] = value
        guarded[name] = wide[..., 5:-4]
    for name in ("lm_bias", "reward_bias"):
        block = torch.full((case[name].numel() + 20,), torch.nan, dtype=dtype)
        block[7:-13] = case[name].flatten()
        guarded[name] = block[7:-13].view(case[name].shape)
    with torch.no_grad():
        got = ops.decode_step(**guarded)
    assert_same_bits(got, expected)
    assert_same_bits({name: guarded[name] for name in STATE}, expected_state)
    for name, block, before in bands:
        assert torch.equal(block[:64], before[:64]) and torch.equal(block[-64:], before[-64:]), name


# Each tensor ends at a protected page and, in a second round, begins after one.
GUARD_PAGES = """
import ctypes, mmap, torch
from decode_cases import CPU_ISAS, forced_isa, make_case
from dualhead_ext import ops
from dualhead_ext.quantization import FORMATS, quantize

libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(value, at_end):
    size = value.numel() * value.element_size()
    pages = -(-size // mmap.PAGESIZE) + 2
    block = mmap.mmap(-1, pages * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for page in (0, pages - 1):
        at = ctypes.c_void_p(address + page * mmap.PAGESIZE)
        assert libc.mprotect(at, mmap.PAGESIZE, 0) == 0
    offset = (pages - 1) * mmap.PAGESIZE - size if at_end else mmap.PAGESIZE
    kept.append(block)
    raw = torch.frombuffer(block, dtype=torch.uint8, count=size, offset=offset)
    return raw.view(value.dtype).view(value.shape).copy_(value)

for isa in CPU_ISAS:
    for dtype in (torch.float32, torch.bfloat16):
        for B, d, V, K, S in ((1, 1, 1, 1, 1), (3, 33, 65, 2, 70), (7, 50, 131, 1, 9)):
            for at_end in (True, False):
                case = make_case(0, B, d, V, K, dtype, S=S, bias=True, controls=True, sample=True,
                                 objective_weights=True, record_attention=True)
                case = {k: guarded(v, at_end) if isinstance(v, torch.Tensor) else v
                        for k, v in case.items()}
                with forced_isa(isa), torch.no_grad():
                    assert ops.decode_step(**case).status.eq(0).all()
        for name in FORMATS:
            d = 256 if name == "int4" else 50
            for at_end in (True, False):
                case = make_case(0, 5, d, 131, 2, dtype, gate="logit", bias=True)
                for head in ("lm", "reward"):
                    q, scale = quantize(case[f"{head}_weight"], name)
                    case |= {f"{head}_weight": q, f"{head}_scale": scale}
                case = {k: guarded(v, at_end) if isinstance(v, torch.Tensor) else v
                        for k, v in case.items()}
                with forced_isa(isa), torch.no_grad():
                    assert ops.decode_step(**case).status.eq(0).all()
print("touched nothing")
"""


def test_pages_around_the_tensors_are_not_touched():
    """In a child process, because a stray access kills it."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD_PAGES],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parent]))},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "touched nothing\n", (done.returncode, done.stderr)


@pytest.mark.parametrize("offset", [1, 3, 8, 15])
def test_layouts_change_no_bit(isa, dtype, seed, offset):
    """Misaligned pointers, rows with gaps, small arguments that are expanded or column-major."""
    B, d, V, K = 5, 70, 100, 2
    case = make_case(seed, B, d, V, K, dtype, controls=True, objective_weights=True, sample=True)
    case["temperature"] = torch.full((B,), 0.7)
    expected, _ = run(ops.decode_step, case)

    def shifted(value):
        block = torch.empty(value.numel() + offset, dtype=value.dtype)
        block[offset:] = value.flatten()
        return block[offset:].view(value.shape)

    moved = {k: shifted(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    assert_same_bits(run(ops.decode_step, moved)[0], expected, "storage offset")
    strided = dict(case)
    strided["lm_weight"] = case["lm_weight"].repeat_interleave(2, 0)[::2]
    strided["reward_weight"] = case["reward_weight"].repeat(1, 2, 1)[:, :V]
    strided["hidden"] = case["hidden"].T.contiguous().T
    strided["q_weight"] = case["q_weight"].T.contiguous().T
    strided["objective_weights"] = case["objective_weights"].T.contiguous().T
    strided["strength"] = case["strength"].repeat_interleave(3)[::3]
    strided["temperature"] = torch.tensor([0.7]).expand(B)
    assert_same_bits(run(ops.decode_step, strided)[0], expected, "strides")
