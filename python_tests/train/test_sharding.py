# SPDX-License-Identifier: Apache-2.0
"""FSDP2 in two gloo processes.

The heads are those of one process. Any number of processes can resume from a checkpoint. The
backbone stays sharded while its hidden states are cached.
"""

import json

import pytest
import torch
from fsdp_cases import CASES, assert_close, assert_same_figures, assert_trained, run
from safetensors.torch import load_file
from tiny_models import make_backbone
from torchrun import run_in_two_processes
from trainer_cases import heads

import dualhead_ext as dh

pytestmark = pytest.mark.slow

ONE = {"gradient_accumulation_steps": 4}  # two processes take two each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def one(folder):
    """Each case's trainer in one process. The folder one/rows has checkpoints."""
    return {name: run(folder / "one" / name, name, **ONE) for name in CASES}


@pytest.fixture(scope="module")
def two(folder, one):
    """The results of fsdp_training.py."""
    run_in_two_processes("fsdp_training.py", folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_heads_and_figures_of_one_process(folder, one, two, name):
    expected = heads(one[name].model)
    assert_close(load_file(folder / f"{name}.safetensors"), expected)
    assert_trained(name, expected)
    logs = one[name].state.log_history
    assert len(two[name]["logs"]) == len(logs) + 1  # the last entry is the evaluation
    assert_same_figures(one[name], two[name])
    curve = one[name].model.dual_head_config.kl_curve
    torch.testing.assert_close(
        torch.tensor(two[name]["curve"] or []), torch.tensor(curve or []), rtol=1e-3, atol=1e-5
    )


def test_which_process_holds_which_shard(two):
    """Full heads are split by rows of the vocabulary if the number of rows is even, else by
    columns.

    No process holds all of a parameter that can be split.
    """
    assert two["rows"]["shares"]["lm_head.reward_head.weight"] == [1, 51, 32]
    assert two["tied"]["shares"]["lm_head.reward_head.weight"] == [1, 101, 16]
    for name in CASES:
        whole = dict(CASES[name][0]().named_parameters())
        for parameter, share in two[name]["shares"].items():
            shape = whole[parameter].shape if parameter in whole else (1,)
            if shape[0] > 1 or any(size % 2 == 0 for size in shape):
                assert share != list(shape), parameter


def test_files_are_those_of_any_run(folder, two):
    """Heads saved by two processes load in one process.

    Saving the shared model itself is refused.
    """
    backbone = make_backbone("llama", vocab_size=102)
    model = dh.DualHeadForCausalLM.from_pretrained(folder / "rows", backbone)
    expected = load_file(folder / "rows.safetensors")
    for name, value in model.named_parameters():
        if name in expected:
            assert torch.equal(value, expected[name])
    assert "save them by the trainer's save_model, on all of them" in two["refused"]


def test_resumed_by_as_many_processes_to_the_bit(two):
    assert two["again"] == {"same_heads": True, "same_history": True}


def test_resumed_by_another_number_of_processes(folder, one, two):
    """Two processes resume from one process's checkpoint, one from theirs, and the result is the
    same.
    """
    expected = heads(one["rows"].model)
    assert_close(load_file(folder / "from_one.safetensors"), expected)
    resumed = run(folder / "from_two", "rows", resume=folder / "rows" / "checkpoint-2", **ONE)
    assert_close(heads(resumed.model), expected)
    log = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    whole = [entry["loss"] for entry in one["rows"].state.log_history if "loss" in entry]
    assert log == pytest.approx(whole, rel=1e-5)
    with pytest.raises(ValueError, match="the number of rows a step was 8, is 4"):
        run(folder / "refused", "rows", resume=folder / "rows" / "checkpoint-2")


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_a_cache_of_hidden_states_built_by_a_sharded_backbone(folder, two, place):
    expected = load_file(folder / "tied.safetensors")
    assert_close(load_file(folder / f"cached-{place}.safetensors"), expected)


def test_heads_train_alone_on_what_two_processes_have_cached(folder, two, monkeypatch):
    """For a backbone too large for one device: cache with sharding, then train in one process."""
    monkeypatch.setattr(
        dh.DualHeadForCausalLM, "_hidden_states", lambda *_, **__: pytest.fail("the backbone runs")
    )
    alone = run(folder / "alone", "tied", cache_hidden=str(folder / "cache"), **ONE)
    assert_close(heads(alone.model), load_file(folder / "tied.safetensors"))
