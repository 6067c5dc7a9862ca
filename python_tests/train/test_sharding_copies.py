# SPDX-License-Identifier: Apache-2.0
"""FSDP2 over copies and shards (HSDP) in four gloo processes, by examples/accelerate/hsdp.yaml.

Two copies of the model, each sharded over two processes, give the heads of one process.
"""

import json

import pytest
from fsdp_cases import COPIED, assert_close, assert_same_figures, assert_trained, run
from safetensors.torch import load_file
from torchrun import run_in_processes
from trainer_cases import heads

pytestmark = pytest.mark.slow

ONE = {"gradient_accumulation_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def one(folder):
    """Each case's trainer in one process. The folder one/rows has checkpoints."""
    return {name: run(folder / "one" / name, name, **ONE) for name in COPIED}


@pytest.fixture(scope="module")
def four(folder, one):
    """The results of fsdp_copies.py."""
    run_in_processes(4, "fsdp_copies.py", folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", COPIED)
def test_the_heads_and_figures_of_one_process(folder, one, four, name):
    found, expected = four[name], heads(one[name].model)
    assert found["mesh"] == [2, 2] and found["copies_of_shards"]
    assert_close(load_file(folder / f"{name}.safetensors"), expected)
    assert_trained(name, expected)
    assert_same_figures(one[name], found)


def test_a_share_is_half_of_a_full_head(four):
    assert four["rows"]["shares"]["lm_head.reward_head.weight"] == [1, 51, 32]
    assert four["tied"]["shares"]["lm_head.reward_head.weight"] == [1, 101, 16]


def test_resumed_by_as_many_processes_to_the_bit(four):
    assert four["again"] == {"same_heads": True, "same_history": True}


def test_resumed_by_another_number_of_processes(folder, one, four):
    """Four processes resume from one process's checkpoint, and one from theirs."""
    expected = heads(one["rows"].model)
    assert_close(load_file(folder / "from_one.safetensors"), expected)
    resumed = run(folder / "from_four", "rows", resume=folder / "rows" / "checkpoint-2", **ONE)
    assert_close(heads(resumed.model), expected)


def test_a_cache_of_hidden_states(folder, four):
    expected = load_file(folder / "tied.safetensors")
    assert_close(load_file(folder / "cached.safetensors"), expected)
