# SPDX-License-Identifier: Apache-2.0
"""The training loss on a real device, with the cases of the CPU's tests.

The tests compare it with the reference in float64 and with eager's error. They also cover autocast,
equal bits, and that the host never waits.
"""

from __future__ import annotations

import pytest
import torch
from decode_cases import bits
from fused_loss_cases import WEIGHTS, loss_and_gradients, objectives, with_reference
from loss_cases import DIFFERENTIABLE, OPTION_SETS, batch
from loss_rows_cases import OPTIONS, SIZES, in_double, in_pytorch, problem, run

from dualhead_ext import build_info, ops
from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss import chunked
from dualhead_ext.loss.terms import LossCounts, LossOptions

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def there(tensors):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def test_the_kernel_is_built_and_used(seed):
    p = there(problem(seed, 3, 20))
    assert ops.loss_rows_kernel_for(p["z_rm"]), build_info()


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_err_at_most_as_eager(name, seed):
    options, ours, theirs = LossOptions(**OPTIONS[name]), {}, {}
    for i, (n, V) in enumerate([*SIZES, (512, 32003), (64, 128256)]):
        p = there(problem(seed + i, n, V))
        exact = run(in_double(p), options)
        for errors, got in ((ours, run(p, options)), (theirs, in_pytorch(p, options))):
            for key, value in exact.items():
                scale = value.abs().max().clamp(min=1.0)
                errors.setdefault(key, []).append(((got[key] - value) / scale).flatten())
    for key in ours:
        mine, other = torch.cat(ours[key]).abs(), torch.cat(theirs[key]).abs()
        assert mine.square().mean().sqrt() <= 1.5 * other.square().mean().sqrt() + 1e-8, key
        assert mine.max() <= 3 * other.max() + 1e-7, key


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_rows_of_large_logits_and_saturated_gates(mix, seed):
    p = there(problem(seed, 8, 300, scale=1e4))
    gates = [60.0, -60.0, 1e30, -1e30, torch.inf, -torch.inf, 20.0, 0.0]
    p["gate_logit"] = torch.tensor(gates, device=DEVICE)
    got, exact = run(p, LossOptions(mix=mix)), run(in_double(p), LossOptions(mix=mix))
    for key, value in exact.items():
        size = value.abs().max().clamp(min=1.0)
        assert ((got[key] - value).abs() <= 1e-5 * size).all(), key


@pytest.mark.parametrize("V", [31, 1003, 32000])
def test_bits_depend_on_the_row_alone(V, seed):
    p, options = there(problem(seed, 40, V)), LossOptions(mix="probs")
    expected = run(p, options)
    for _ in range(5):
        again = run(p, options)
        assert all(torch.equal(bits(again[k]), bits(v)) for k, v in expected.items())
    for i in (0, 17, 39):
        alone = run({k: v[i : i + 1] for k, v in p.items()}, options)
        assert all(torch.equal(bits(alone[k]), bits(v[i : i + 1])) for k, v in expected.items())


def test_rows_on_a_stream_of_their_own(seed):
    p, options = there(problem(seed, 64, 5003)), LossOptions()
    expected = run(p, options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(stream):
            got = run(p, options)
        stream.synchronize()
        assert all(torch.equal(bits(got[k]), bits(v)) for k, v in expected.items())


def test_a_tensor_on_another_device_is_named(seed):
    p = problem(seed, 3, 20)
    with pytest.raises(
        RuntimeError,
        match=r"loss_rows: gate_logit must be on the device of z_rm \(device 0\), got cpu",
    ):
        ops.loss_rows(
            p["z_lm"].cuda(), p["z_rm"].cuda(), p["gate_logit"], p["labels"].cuda(),
            True, True, False, 1.0, 0.0,
        )  # fmt: skip


# --- the whole loss ------------------------------------------------------------------------------


@pytest.fixture(params=[1, 64 << 20], ids=["1 B", "64 MiB"])
def workspace(request, monkeypatch):
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", request.param)


@pytest.mark.parametrize("name", OPTION_SETS)
def test_every_option_follows_the_cpu(workspace, name, seed):
    """In float64 the loss uses PyTorch's operators.

    It is compared with the reference on the CPU.
    """
    for rows, K, more in ((8, 1, {}), (9, 3, {"num_pairs": 3, **objectives(seed, 3, 3)})):
        t, options = batch(seed, rows, objectives=K), OPTION_SETS[name] | more
        got, grads = loss_and_gradients(there(t), **there(options))
        expected, exact = with_reference(loss_and_gradients, t, **options)
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(got.loss.cpu(), expected.loss, **close)
        torch.testing.assert_close(got.totals.cpu(), expected.totals, **close)
        for key, grad in exact.items():
            grad = torch.zeros_like(t[key]) if grad is None else grad
            torch.testing.assert_close(grads[key].cpu(), grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["default", "probs", "mixed"])
def test_errors_are_at_most_those_of_eager(monkeypatch, name, dtype, seed):
    """The kernel's loss and gradients against float64: root mean square error over all problems."""
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 40_000)
    wanted, options = ("reward_weight", "gate_logit"), OPTION_SETS[name]
    ours, theirs = ({n: [] for n in (*wanted, "loss")} for _ in range(2))
    for i in range(40):
        t = batch(seed + i, 8, 12, 48, 301, dtype=torch.float32)
        t |= {n: (t[n] * (0.3 if "weight" in n else 1)).to(dtype) for n in ("hidden", *WEIGHTS)}
        truth, exact = with_reference(loss_and_gradients, in_double(there(t)), wanted, **options)
        eager = with_reference(loss_and_gradients, there(t), wanted, **options)
        for errors, (out, grads) in (
            (ours, loss_and_gradients(there(t), wanted, **options)),
            (theirs, eager),
        ):
            grads = grads | {"loss": out.loss.detach()[None]}
            for n, grad in (exact | {"loss": truth.loss.detach()[None]}).items():
                scale = grad.abs().max().clamp(min=1e-12)
                errors[n].append(((grads[n] - grad) / scale).flatten())
    for n in ours:
        mine, other = (torch.cat(e[n]).square().mean().sqrt() for e in (ours, theirs))
        assert mine <= 1.1 * other + 1e-7, (n, mine, other)


def test_autocast_multiplies_in_bf16(seed):
    """With fp32 weights, the result is as close to fp32 as bf16 factors allow, but not equal."""
    t = there(batch(seed, 8, 16, 64, 500, dtype=torch.float32))
    wanted = ("reward_weight", "gate_logit")
    plain, exact = loss_and_gradients(t, wanted)
    with torch.autocast(DEVICE, torch.bfloat16):
        narrow, grads = loss_and_gradients(t, wanted)
    assert narrow.loss.dtype == torch.float32 and not torch.equal(narrow.loss, plain.loss)
    torch.testing.assert_close(narrow.loss, plain.loss, rtol=2e-2, atol=2e-2)
    for name, grad in exact.items():
        assert (grads[name] - grad).norm() <= 0.05 * grad.norm(), name


@pytest.mark.parametrize("name", OPTION_SETS)
def test_reruns_are_equal_to_the_bit(workspace, name, seed):
    t = there(batch(seed, 8, 40, 64, 700, dtype=torch.float32))
    expected, exact = loss_and_gradients(t, ("reward_weight", "gate_logit"), **OPTION_SETS[name])
    for _ in range(5):
        out, grads = loss_and_gradients(t, ("reward_weight", "gate_logit"), **OPTION_SETS[name])
        assert torch.equal(bits(out.loss.detach()), bits(expected.loss.detach()))
        assert all(torch.equal(bits(grads[k]), bits(v)) for k, v in exact.items())


# --- waiting -------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting():
    """A function that makes every wait of the host an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", OPTION_SETS)
def test_the_host_never_waits(workspace, no_waiting, name, autocast, seed):
    t = batch(seed, 9, 12, 16, 90, objectives=3, dtype=torch.float32)
    lengths, host = t["mask"].sum(-1).tolist(), objectives(seed, 4, 3)
    t = there(t)
    for key in ("reward_weight", "gate_logit"):
        t[key].requires_grad_()
    counts = LossCounts(*torch.tensor([5.0, 30.0, 4.0, 60.0], device=DEVICE).unbind())
    torch.cuda.synchronize()
    no_waiting()
    for of_batch in (None, counts):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = dual_head_loss(
                **t, num_pairs=4, lengths=lengths, counts=of_batch, **host, **OPTION_SETS[name]
            )
        out.loss.backward()


def test_waiting_would_be_seen(no_waiting, seed):
    t = there(batch(seed))
    no_waiting()
    with pytest.raises(RuntimeError, match="synchroniz"):
        dual_head_loss(**t)


def test_what_is_trained_is_all_that_gets_a_gradient(seed):
    t = there(batch(seed, dtype=torch.float32))
    _, grads = loss_and_gradients(t, ("reward_weight",))
    assert list(grads) == ["reward_weight"] and set(grads) < set(DIFFERENTIABLE)
