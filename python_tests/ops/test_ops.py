# SPDX-License-Identifier: Apache-2.0
"""The fused CPU step against the reference, for every instruction set this machine runs: values,
layouts, the cache, NaN, and that a row's bits depend on nothing but the row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_cases import (
    CPU_ISAS,
    STATE,
    assert_same_bits,
    bits,
    forced_isa,
    in_double,
    make_case,
    rows,
    run,
    threads,
)

from dualhead_ext import ops, reference

HERE = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16]
BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64]


@pytest.fixture(params=CPU_ISAS)
def isa(request):
    """Runs the test once per instruction set, forced."""
    with forced_isa(request.param):
        assert ops.cpu_isa() == request.param
        yield request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


# --- values ---------------------------------------------------------------------------------------

# Every feature and odd size at least once with each mixture: B, d, V, K, options.
VALUE_CASES = [
    (1, 1, 1, 1, {"S": 1}),
    (2, 3, 5, 1, {"H": 1, "d_k": 1, "S": 2}),
    (3, 31, 63, 2, {"bias": True}),
    (4, 33, 64, 1, {"bias": True, "logit_softcap": 2.5}),
    (5, 64, 65, 3, {"objective_weights": True, "logit_scale": 0.25}),
    (7, 127, 129, 1, {"H": 8, "d_k": 48, "S": 70, "controls": True}),
    (9, 130, 257, 1, {"gate": "logit", "controls": True, "bias": True}),
    (17, 100, 191, 4, {"bias": True, "objective_weights": True, "controls": True}),
    (65, 37, 67, 1, {"S": 130, "H": 2, "d_k": 17}),
    (6, 384, 1000, 1, {"logit_scale": -1.5, "logit_softcap": 30.0, "S": 200}),
]


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_errors_are_at_most_those_of_eager(isa, dtype, mix_probs, seed):
    """Against float64 on the same numbers: root mean square and largest error, over all cases."""
    names = ("logits", "alpha", "gate_logit", "logprob", "attention")
    ours, theirs = ({name: [] for name in names} for _ in range(2))
    for i, (B, d, V, K, options) in enumerate(VALUE_CASES * 3):
        case = make_case(
            seed + i, B, d, V, K, dtype, mix_probs=mix_probs, record_attention=True, **options
        )
        truth, _ = run(reference.decode_step, in_double(case))
        got, _ = run(ops.decode_step, case)
        eager, _ = run(reference.decode_step, case)
        assert got.status.eq(0).all() and got.logits.dtype == torch.float32
        for name in names:
            exact = getattr(truth, name)
            # logprob is compared where all picked the same token.
            same = (got.token == truth.token) & (eager.token == truth.token)
            keep = same if name == "logprob" else slice(None)
            scale = exact.abs().max().clamp(min=1.0) if exact.numel() else 1.0
            for errors, out in ((ours, got), (theirs, eager)):
                errors[name].append(((getattr(out, name) - exact) / scale)[keep].flatten())
    for name in names:
        mine, other = torch.cat(ours[name]).abs(), torch.cat(theirs[name]).abs()
        # Eager fp32 sums in 16 lanes or more; fewer lanes make longer chains.
        factor = 1.1 if dtype == torch.bfloat16 or isa.startswith("avx512") else 2.0
        rms, eager_rms = mine.square().mean().sqrt(), other.square().mean().sqrt()
        assert rms <= factor * eager_rms, (name, rms, eager_rms)
        assert mine.max() <= 2 * factor * other.max(), (name, mine.max(), other.max())


def test_dot_products_are_within_the_proven_bound(isa, dtype, seed):
    """|z - exact| <= gamma_n sum |w| |h|, n = additions that a term passes through: products of
    bf16 are exact in fp32, those of fp32 are rounded once."""
    lanes = {"avx512bf16": 16, "avx512": 16, "avx2": 8, "portable": 4}[isa]
    for d in (1, 15, 16, 17, 31, 32, 33, 100, 1023, 4097):
        case = make_case(seed + d, 5, d, 130, 1, dtype, gate="logit", alpha=torch.zeros(5))
        got, _ = run(ops.decode_step, case)
        h, w = case["hidden"].double(), case["lm_weight"].double()
        unit = 2.0**-24
        n = -(-d // lanes) + 2 + lanes.bit_length()
        bound = n * unit / (1 - n * unit) * (h.abs() @ w.abs().T)
        assert ((got.logits - h @ w.T).abs() <= bound).all()


def test_greedy_token_is_the_exact_argmax(isa, dtype, seed):
    """Wherever the float64 margin exceeds the rounding of fp32 sums."""
    case = make_case(seed, 300, 65, 257, 1, dtype, H=1, d_k=2, S=3)
    got, _ = run(ops.decode_step, case)
    case |= {"alpha": got.alpha}
    truth, _ = run(reference.decode_step, in_double(case))
    top = truth.logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-4
    assert clear.sum() > 290 and torch.equal(got.token[clear], truth.token[clear])


def test_ties_go_to_the_lowest_index(isa, seed):
    case = make_case(seed, 2, 8, 400, gate="logit")
    case["lm_weight"][:] = case["reward_weight"][:] = 0.0
    for best in ([0, 399], [17, 18], [63, 64, 65], [128, 300], [399]):
        bias = torch.zeros(400)
        bias[best] = 1.0
        got, _ = run(ops.decode_step, case | {"lm_bias": bias, "reward_bias": bias[None]})
        assert got.token.tolist() == [best[0]] * 2


def test_signed_zeros_tie(isa, seed):
    case = make_case(seed, 1, 8, 100, gate="logit", alpha=torch.zeros(1))
    case["lm_weight"][:] = 0.0
    bias = torch.full((100,), -1.0)
    bias[70], bias[80] = -0.0, 0.0
    got, _ = run(ops.decode_step, case | {"lm_bias": bias})
    assert got.token.item() == 70


# --- state ----------------------------------------------------------------------------------------


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
    """40 steps from an empty cache, over several blocks of columns, ragged and with padding."""
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
    """NaN in columns that are unfilled or padding changes no bit."""
    case = make_case(seed, 4, 30, 40, 1, dtype, S=100, record_attention=True)
    expected, _ = run(ops.decode_step, case)
    hidden = (torch.arange(100) >= case["cache_length"][:, None]) | ~case["cache_valid"]
    hidden[torch.arange(4), case["cache_length"].long()] = False  # the new column is written anyway
    for name in ("cache_k", "cache_u"):
        case[name].movedim(2, 1)[hidden] = torch.nan
    got, _ = run(ops.decode_step, case)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("length", [9, 10, 2**31 - 1, -1, -(2**31)])
def test_full_cache(isa, dtype, seed, length):
    """Status 2, nothing of the row written, neighbours untouched; a length that no cache can have
    counts as full."""
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
    """Caches between guard bands; weights, hidden states and biases with NaN around every row."""
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


# Every tensor ends, and in a second round begins, at a page that must not be touched.
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
    """In a child process: a stray access ends it."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD_PAGES],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parent]))},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "touched nothing\n", (done.returncode, done.stderr)


@pytest.mark.parametrize("offset", [1, 3, 8, 15])
def test_layouts_change_no_bit(isa, dtype, seed, offset):
    """Misaligned pointers, rows apart, expanded and column-major small arguments."""
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


# --- one row, one result --------------------------------------------------------------------------


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_a_row_depends_neither_on_its_batch_nor_on_its_place(isa, dtype, mix_probs, seed):
    case = make_case(
        seed, 64, 75, 150, 2, dtype, S=80, sample=True, controls=True, bias=True,
        objective_weights=True, mix_probs=mix_probs, record_attention=True,
    )  # fmt: skip
    case |= {"top_p": torch.rand(64), "top_k": torch.randint(0, 9, (64,), dtype=torch.int32)}
    alone = [run(ops.decode_step, rows(case, [b])) for b in range(64)]
    generator = torch.Generator().manual_seed(seed)
    for B in BATCHES:
        chosen = torch.randperm(64, generator=generator)[:B].tolist()
        got, state = run(ops.decode_step, rows(case, chosen))
        expected = type(got)(*(torch.cat([alone[b][0][i] for b in chosen]) for i in range(7)))
        assert_same_bits(got, expected, f"B={B}")
        for name in STATE:
            assert torch.equal(
                bits(state[name]), bits(torch.cat([alone[b][1][name] for b in chosen]))
            )


@pytest.mark.parametrize("d", [1024, 2100, 4096, 9000])
def test_a_row_depends_not_on_its_batch_when_rows_are_long(isa, dtype, d, seed):
    """Sums in several turns, row by row or in tiles, as d and B have it."""
    case = make_case(seed, 11, d, 70, 2, dtype, S=9, sample=True)
    whole, _ = run(ops.decode_step, case)
    for chosen in ([0], [10], [3, 4], [5, 6, 7], [0, 1, 2, 8, 9]):
        got, _ = run(ops.decode_step, rows(case, chosen))
        expected = type(got)(*(x[chosen] if x.numel() else x for x in whole))
        assert_same_bits(got, expected, f"rows {chosen}")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_stay_alone(isa, dtype, seed, poison):
    """NaN or infinite hidden states: status 1, token 0; every other row keeps its bits."""
    for B in (2, 7, 16):
        case = make_case(seed + B, B, 65, 200, 1, dtype, sample=True, record_attention=True)
        clean, _ = run(ops.decode_step, case)
        bad = [1, B - 1]
        case["hidden"][bad, 40] = poison
        got, _ = run(ops.decode_step, case)
        assert (got.status[bad] == 1).all() and (got.token[bad] == 0).all()
        assert got.logprob[bad].isnan().all()
        good = [b for b in range(B) if b not in bad]
        assert got.status[good].eq(0).all()
        for name, value in zip(got._fields, got, strict=True):
            assert torch.equal(bits(value[good]), bits(getattr(clean, name)[good])), name


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_thread_count_changes_no_bit(isa, dtype, mix_probs, seed):
    """Large enough that every phase is shared between threads."""
    case = make_case(
        seed, 5, 300, 4000, 1, dtype, H=4, d_k=32, S=1200, sample=True, mix_probs=mix_probs,
        record_attention=True,
    )  # fmt: skip
    case["cache_length"] = torch.tensor([1199, 700, 0, 64, 1000], dtype=torch.int32)
    with threads(1):
        expected = run(ops.decode_step, case)
    for count in (2, 3, 7):
        with threads(count):
            got = run(ops.decode_step, case)
        assert_same_bits(got[0], expected[0], f"{count} threads")
        assert_same_bits(got[1], expected[1], f"{count} threads")


def test_runs_repeat(isa, dtype, seed):
    case = make_case(seed, 3, 100, 500, 2, dtype, sample=True, controls=True)
    expected = run(ops.decode_step, case)
    for _ in range(50):
        got = run(ops.decode_step, case)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


def test_calls_from_several_threads(seed):
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(seed, 2, 64, 300, 1, torch.bfloat16, sample=True)
    expected, _ = run(ops.decode_step, case)
    with ThreadPoolExecutor(4) as pool:
        for got, _ in pool.map(lambda _: run(ops.decode_step, case), range(200)):
            assert_same_bits(got, expected)


# --- controls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_controls_follow_the_reference(isa, seed, mix_probs):
    values = torch.tensor([0.0, 0.25, 1.0, 1.7, 4.0, 0.5, 0.5])
    case = make_case(seed, 7, 20, 30, gate="logit", strength=values, mix_probs=mix_probs)
    case["gate_logit"] = torch.tensor([0.3, -2.0, 90.0, 1.0, -1e30, torch.inf, -torch.inf])
    for extra in ({}, {"gate_offset": torch.linspace(-3, 3, 7)}, {"alpha": torch.rand(7)}):
        got, _ = run(ops.decode_step, case | extra)
        truth, _ = run(reference.decode_step, in_double(case | extra))
        assert (got.alpha - truth.alpha).abs().max() < 4e-7
        assert mix_probs or extra or got.alpha[3] > 1
        assert torch.equal(got.gate_logit.double(), truth.gate_logit.float().double())
        assert (got.logits - truth.logits).abs().max() < 2e-5


@pytest.mark.parametrize("mix_probs", [False, True], ids=["logits", "probs"])
def test_a_head_that_is_switched_off_does_not_matter(isa, dtype, mix_probs, seed):
    """alpha 0 and 1 select: by strength, by alpha, by an infinite gate logit; NaN elsewhere."""
    case = make_case(seed, 4, 40, 90, 1, dtype, gate="logit", mix_probs=mix_probs)
    expected, _ = run(ops.decode_step, case | {"alpha": torch.zeros(4)})
    broken = case | {"reward_weight": torch.full_like(case["reward_weight"], torch.nan)}
    ways = {
        "strength": {"strength": torch.zeros(4), "alpha": torch.full((4,), torch.nan)},
        "alpha": {"alpha": torch.zeros(4)},
        "logit": {"gate_logit": torch.full((4,), -torch.inf)},
    }
    for way in ways.values():
        got, _ = run(ops.decode_step, broken | way)
        assert got.status.eq(0).all() and got.alpha.eq(0).all()
        assert_same_bits(got._replace(gate_logit=expected.gate_logit), expected)
    broken = case | {"lm_weight": torch.full_like(case["lm_weight"], torch.nan)}
    got, _ = run(ops.decode_step, broken | {"gate_logit": torch.full((4,), torch.inf)})
    plain, _ = run(ops.decode_step, case | {"alpha": torch.ones(4)})
    assert_same_bits(got._replace(gate_logit=plain.gate_logit), plain)


def test_status_of_what_is_not_finite(isa, dtype, seed):
    case = make_case(seed, 3, 40, 90, 1, dtype, bias=True)
    nothing = torch.full((90,), -torch.inf, dtype=dtype)

    def status(**changes):
        got, _ = run(ops.decode_step, case | changes)
        assert ((got.token >= 0) & (got.token < 90)).all()
        assert (got.token[got.status != 0] == 0).all()
        return got.status.tolist()

    bias = case["lm_bias"].clone()
    bias[:-1] = -torch.inf  # one survivor is a distribution
    assert status(lm_bias=bias, reward_bias=bias[None]) == [0, 0, 0]
    assert status(lm_bias=nothing, reward_bias=nothing[None]) == [1, 1, 1]
    assert status(lm_bias=-nothing, reward_bias=-nothing[None]) == [1, 1, 1]
    assert status(lm_bias=nothing, alpha=torch.tensor([0.5, 1.0, 0.0])) == [1, 0, 1]
    assert status(alpha=torch.tensor([0.5, torch.nan, 0.0])) == [0, 1, 0]
    assert status(gate_offset=torch.tensor([torch.nan, torch.inf, -torch.inf])) == [1, 0, 0]
    poisoned = case["cache_k"].clone()
    poisoned[1] = torch.nan
    lengths, valid = torch.full((3,), 4, dtype=torch.int32), torch.ones(3, 9, dtype=torch.bool)
    seen = {"cache_k": poisoned, "cache_length": lengths, "cache_valid": valid}
    assert status(**seen) == [0, 1, 0]
    assert status(**seen, strength=torch.zeros(3)) == [0, 0, 0]
