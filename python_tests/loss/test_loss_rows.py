# SPDX-License-Identifier: Apache-2.0
"""The compiled rows of the training loss, against the same formulas in PyTorch's operators.

The tests run for every instruction set and for the CUDA kernel on the host backend, with odd sizes
and extreme values.
"""

import pytest
import torch
from decode_cases import CPU_ISAS, bits, forced_isa, threads
from loss_rows_cases import OPTIONS, SIZES, in_double, in_pytorch, problem, run
from loss_rows_host import on_the_host_backend

from dualhead_ext import ops
from dualhead_ext.loss import rows as loss_rows
from dualhead_ext.loss.terms import LossOptions

HOST_CUDA = "host cuda"


@pytest.fixture(params=[*CPU_ISAS, HOST_CUDA])
def isa(request):
    if request.param == HOST_CUDA:
        with on_the_host_backend():
            yield request.param
    else:
        with forced_isa(request.param):
            yield request.param


WANTED = [(True, True, True), (True, False, False), (False, True, True), (True, True, False)]


@pytest.mark.quick_cases(16)
@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_errors_are_at_most_those_of_eager(isa, name, wanted, seed):
    options = LossOptions(**OPTIONS[name])
    ours, theirs = {}, {}
    for i, (n, V) in enumerate(SIZES * 4):
        p = problem(seed + i, n, V)
        truth = run(in_double(p), options, *wanted)
        for errors, got in (
            (ours, run(p, options, *wanted)),
            (theirs, in_pytorch(p, options, *wanted)),
        ):
            assert got.keys() == truth.keys()
            for key, exact in truth.items():
                scale = exact.abs().max().clamp(min=1.0)
                errors.setdefault(key, []).append(((got[key] - exact) / scale).flatten())
    for key in ours:
        mine, other = torch.cat(ours[key]).abs(), torch.cat(theirs[key]).abs()
        rms, eager = mine.square().mean().sqrt(), other.square().mean().sqrt()
        assert rms <= 1.5 * eager + 1e-8, (key, rms, eager)
        assert mine.max() <= 3 * other.max() + 1e-7, (key, mine.max(), other.max())


def test_the_kernel_is_what_runs(seed):
    p = problem(seed, 3, 20)
    rows = loss_rows.log_probabilities(
        p["z_lm"], p["z_rm"], p["gate_logit"], p["labels"], LossOptions(), mixed=True, reward=False
    )
    assert rows.normalizers is not None


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_large_logits_and_saturated_gates(isa, mix, seed):
    options = LossOptions(mix=mix)
    p = problem(seed, 8, 300, scale=1e4)
    p["gate_logit"] = torch.tensor([60.0, -60.0, 1e30, -1e30, torch.inf, -torch.inf, 20.0, 0.0])
    got, exact = run(p, options), run(in_double(p), options)
    for key, value in exact.items():
        assert got[key].isfinite().all(), key
        size = value.abs().max().clamp(min=1.0)
        assert ((got[key] - value).abs() <= 1e-5 * size).all(), key
    # A tiny derivative is not rounded to zero.
    assert (got["gate"][:2] == 0).equal(exact["gate"][:2] == 0)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_a_head_that_is_switched_off_may_hold_anything(isa, mix, seed):
    p = problem(seed, 2, 50)
    p["gate_logit"] = torch.tensor([-torch.inf, torch.inf])
    expected = run(p, LossOptions(mix=mix), reward=False)
    p["z_rm"][0], p["z_lm"][1] = 7e4, -7e4
    got = run(p, LossOptions(mix=mix), reward=False)
    assert torch.equal(got["mixed"], expected["mixed"]) and got["gate"].eq(0).all()
    assert torch.equal(got["z_lm"][0], expected["z_lm"][0])
    assert torch.equal(got["z_rm"][1], expected["z_rm"][1])


def test_not_finite_rows_stay_alone(isa, seed):
    p = problem(seed, 5, 70)
    clean = run(p, LossOptions())
    p["z_rm"][1, 3], p["z_lm"][3, 69] = torch.nan, torch.inf
    got = run(p, LossOptions())
    assert got["mixed"][[1, 3]].isnan().all()
    for key, value in clean.items():
        assert torch.equal(bits(got[key][[0, 2, 4]]), bits(value[[0, 2, 4]])), key


def test_bits_do_not_depend_on_threads_or_neighbours(isa, seed):
    p = problem(seed, 40, 1003)
    with threads(1):
        expected = run(p, LossOptions(mix="probs"))
    for count in (2, 3):
        with threads(count):
            got = run(p, LossOptions(mix="probs"))
        assert all(torch.equal(bits(got[k]), bits(v)) for k, v in expected.items())
    alone = run({k: v[17:18] for k, v in p.items()}, LossOptions(mix="probs"))
    assert all(torch.equal(bits(alone[k]), bits(v[17:18])) for k, v in expected.items())


def test_no_rows():
    assert all(v.numel() == 0 for v in run(problem(0, 0, 9), LossOptions()).values())


BAD = [
    ({"z_rm": lambda z: z[0]}, r"z_rm must be \(n, V\), got \(9,\)"),
    ({"z_rm": lambda z: z.double()}, "z_rm must have dtype float32, got float64"),
    ({"z_rm": lambda z: z.T.contiguous().T}, "z_rm must be contiguous"),
    ({"z_lm": lambda z: z[:, :8].contiguous()}, r"z_lm must be \(4, 9\), got \(4, 8\)"),
    ({"z_lm": lambda z: None}, "z_lm must be given where mixed is asked for"),
    ({"gate_logit": lambda x: x[:3]}, r"gate_logit must be \(4,\), got \(3,\)"),
    ({"labels": lambda x: x.int()}, "labels must have dtype int64, got int32"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments_are_named(change, message):
    p = problem(0, 4, 9)
    p |= {k: f(p[k]) for k, f in change.items()}
    with pytest.raises(RuntimeError, match=f"loss_rows: {message}"):
        ops.loss_rows(
            p["z_lm"], p["z_rm"], p["gate_logit"], p["labels"], True, True, False, 1.0, 0.0
        )


def test_opcheck(seed):
    p = problem(seed, 3, 20)
    arguments = (p["z_lm"], p["z_rm"], p["gate_logit"], p["labels"])
    forward = (*arguments, True, True, False, 1.0, 0.0)
    torch.library.opcheck(torch.ops.dualhead.loss_rows.default, forward)
    mixed, _, normalizers = ops.loss_rows(*forward)
    torch.library.opcheck(
        torch.ops.dualhead.loss_rows_backward_.default,
        (*arguments, normalizers, mixed, p["mixed_grad"], p["reward_grad"], True, False, 1.0, 0.0),
    )
