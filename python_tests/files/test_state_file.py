# SPDX-License-Identifier: Apache-2.0
"""Nested state in one safetensors file: all of an optimizer's state comes back, bit for bit."""

import functools
import json
import math
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dualhead_ext.files.checkpoint import CheckpointError
from dualhead_ext.files.state_file import load_state, save_state


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


NESTED = {
    "none": None,
    "bool": True,
    "int": 2**80,
    "float": [0.1, 1e-310, -0.0, math.pi, math.nan, math.inf, -math.inf],
    "text": '\u00fc \U0001f600 "quoted"',
    "tuple": (1, (2.0, [3]), ()),
    7: {"deep": {(1, "key"): torch.arange(6).view(2, 3).T}},
    "tensors": [torch.tensor(3.5), torch.ones(0), torch.ones(2, dtype=torch.bfloat16)],
    "tensor": "not one",
}


def test_round_trip(tmp_path):
    save_state(tmp_path / "state", NESTED)
    back = load_state(tmp_path / "state")
    assert equal(NESTED, back)
    assert math.copysign(1, back["float"][2]) == -1


def test_tensors_that_share_memory(tmp_path):
    whole = torch.arange(4.0)
    save_state(tmp_path / "state", [whole, whole, whole[1:3]])
    assert equal(load_state(tmp_path / "state"), [whole, whole, whole[1:3]])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_restored_optimizer_takes_the_same_steps(tmp_path, kind):
    def trained(saved_after=None):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = kind([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.01}], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(min, 0.7))
        for step in range(6):
            optimizer.zero_grad()
            layer(torch.full((2, 4), step + 1.0)).square().sum().backward()
            optimizer.step()
            schedule.step()
            if step == saved_after:
                save_state(tmp_path / "state", [optimizer.state_dict(), schedule.state_dict()])
                states = load_state(tmp_path / "state")
                assert equal(states[0], optimizer.state_dict())
                fresh = kind([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=9.0)
                optimizer = fresh
                schedule = torch.optim.lr_scheduler.LambdaLR(fresh, functools.partial(min, 0.7))
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
        return layer.weight

    assert torch.equal(trained(), trained(saved_after=2))


def test_pythons_random_numbers(tmp_path):
    save_state(tmp_path / "state", random.getstate())
    wanted = [random.random() for _ in range(5)]
    random.setstate(load_state(tmp_path / "state"))
    assert [random.random() for _ in range(5)] == wanted


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, print, nn.Linear(1, 1)])
def test_what_cannot_be_stored_is_named(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a .*cannot be stored"):
        save_state(tmp_path / "state", {"a": [1, value]})
    assert not (tmp_path / "state").exists()


def hostile(path, tree, **fields):
    metadata = {"format": "dualhead-state", "format_version": "1", "tree": tree} | fields
    save_file({"0": torch.ones(1)}, path, metadata=metadata)


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[1]",
        "{}",
        '{"tensor": "1"}',
        '{"tensor": ["0"]}',
        '{"object": []}',
        '{"dict": [[1]]}',
        '{"dict": [[{"list": []}, 1]]}',
        '{"float": "1"}',
        '{"list": 3}',
        '{"list": [], "tuple": []}',
        '{"list": [' * 5000,
        '{"list": [' * 2000 + "]}" * 2000,
    ],
)
def test_damaged_trees_are_refused(tmp_path, tree):
    hostile(tmp_path / "state", tree)
    with pytest.raises(CheckpointError, match="tree is damaged"):
        load_state(tmp_path / "state")


def test_foreign_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_state(path)
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_state(path)
    save_file({"0": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is not a file of the format"):
        load_state(path)
    hostile(path, json.dumps(None), format_version="2")
    with pytest.raises(CheckpointError, match=r"format version 2.*update"):
        load_state(path)
