# SPDX-License-Identifier: Apache-2.0
"""The loss never waits for its device if the host knows the lengths.

Here the tensors have no values (FakeTensor), so that reading one is an error. test_cuda_loss.py
checks the same on a GPU.
"""

from functools import partial

import pytest
import torch
from loss_cases import OPTION_SETS, batch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss import chunked
from dualhead_ext.loss.terms import LossCounts


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors without values count as tensors on a device."""
    monkeypatch.setattr(chunked, "on_device", lambda x: isinstance(x, FakeTensor))
    with FakeTensorMode():
        yield


def without_values(tensors, trained=("reward_weight", "gate_logit")):
    found = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in tensors.items()}
    for name in trained:
        found[name].requires_grad_()
    return found


# What the host knows. It is made outside of the tests, where tensors have no values.
PROBLEM = batch(5, rows=9, objectives=3, dtype=torch.float32)
LENGTHS = PROBLEM["mask"].sum(-1).tolist()
OBJECTIVE = {"objective": torch.tensor([2, 0, 2, 1]), "objective_weights": torch.rand(3)}


CASES = [(name, True, 300) for name in OPTION_SETS]
CASES += [(name, False, size) for name in ("default", "mixed_probs") for size in (1, 64 << 20)]


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(("name", "kernel", "workspace"), CASES)
def test_nothing_is_read(elsewhere, monkeypatch, name, kernel, workspace):
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", workspace)
    impl = partial(chunked.dual_head_loss, impl="kernel" if kernel else "torch")
    t = without_values(PROBLEM)
    counts = LossCounts(*torch.empty(4, dtype=torch.float64).unbind())
    for of_batch in (None, counts):
        out = dual_head_loss(**t, num_pairs=4, lengths=LENGTHS, counts=of_batch, **OBJECTIVE,
                             **OPTION_SETS[name], impl=impl)  # fmt: skip
        (out.loss * 0.5).backward()
        assert t["reward_weight"].grad.shape == t["reward_weight"].shape


def test_one_transfer_where_the_host_knows_nothing(monkeypatch):
    """Tensors on the CPU need no transfer."""
    transfers = []
    copied = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: transfers.append(x.shape) or copied(x))
    monkeypatch.setattr(chunked, "on_device", lambda x: True)
    expected = dual_head_loss(**PROBLEM, num_pairs=4, **OBJECTIVE).loss
    assert transfers == [(9 + 1 + 4 + 3,)]
    monkeypatch.setattr(chunked, "on_device", lambda x: False)
    assert torch.equal(dual_head_loss(**PROBLEM, num_pairs=4, **OBJECTIVE).loss, expected)
    assert len(transfers) == 1


def test_reading_would_be_seen(elsewhere):
    with pytest.raises(DataDependentOutputException):
        dual_head_loss(**without_values(PROBLEM), num_pairs=4)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (LENGTHS[:-1], ValueError, "lengths must be of 9 rows, got 8"),
        ([n + 1 for n in LENGTHS], ValueError, r"lengths must be those of mask, \[.*\], got \["),
        ([float(n) for n in LENGTHS], TypeError, "lengths must be a sequence of int"),
        (7, TypeError, "lengths must be a sequence of int, got 7"),
        (torch.tensor(LENGTHS, device="meta"), ValueError, "lengths must be on the CPU, got meta"),
    ],
)
def test_lengths_are_checked(lengths, error, message):
    with pytest.raises(error, match=f"dual_head_loss: {message}"):
        dual_head_loss(**PROBLEM, num_pairs=4, lengths=lengths)


def test_lengths_change_nothing():
    expected = dual_head_loss(**PROBLEM, num_pairs=4)
    for lengths in (LENGTHS, torch.tensor(LENGTHS)):
        got = dual_head_loss(**PROBLEM, num_pairs=4, lengths=lengths)
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.totals, expected.totals)
