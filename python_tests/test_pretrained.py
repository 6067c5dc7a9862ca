# SPDX-License-Identifier: Apache-2.0
"""Heads-only files: restored bit for bit, refused when damaged, foreign or of another backbone;
nothing executed.
"""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext.pretrained import CONFIG_NAME, WEIGHTS_NAME

GREEDY = {"max_new_tokens": 5, "do_sample": False}
load = dh.DualHeadForCausalLM.from_pretrained


@pytest.fixture
def saved(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "heads")
    return model, tmp_path / "heads"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
def test_round_trip_is_bit_for_bit(family, gate, tmp_path):
    model = make_model(family, gate=gate, num_objectives=2, mix="probs")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    again = load(tmp_path, backbone=make_backbone(family))
    assert again.dual_head_config == model.dual_head_config
    expected = model.lm_head_module.state_dict()
    state = again.lm_head_module.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    batch = prompts()
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_files_hold_the_heads_alone_by_their_fixed_names(saved):
    from safetensors import safe_open

    _, folder = saved
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        names = set(file.keys())
    projections = {f"gate.{n}_proj.weight" for n in "qkvo"}
    assert names == {"reward_head.weight", "gate.out.weight", "gate.out.bias"} | projections
    stored = json.loads((folder / CONFIG_NAME).read_text())
    assert stored["backbone"]["name_or_path"] is None and str(folder.parent) not in str(stored)


def test_a_trained_lm_head_is_kept_too(tmp_path):
    model = make_model("llama")
    model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_heads_trained_in_fp32_stay_so_beside_a_bf16_backbone(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama").bfloat16())
    assert again.lm_head.reward_head.weight.dtype == torch.float32
    out = again.generate(**prompts(), **GREEDY)
    assert out.shape == (3, 12)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_embedded_backbone_goes_by_name(tmp_path, kind):
    model = dh.DualHeadForCausalLM.from_backbone(kind(dh.data.embedded_backbone_path()))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert stored["backbone"]["name_or_path"] == "embedded"
    ids = torch.tensor([[0, 201, 201, 301, 28, 400]])
    again = load(tmp_path)
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_save_full_can_be_its_own_backbone(tmp_path):
    model, batch = make_model("llama-tied"), prompts()
    model.save_pretrained(tmp_path, save_full=True)
    again = load(tmp_path, backbone=str(tmp_path))
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 90}, "vocab_size 101, the backbone has 90"),
        ({"hidden_size": 48}, "hidden_size 32, the backbone has 48"),
    ],
)
def test_another_size_is_refused_with_both_numbers(saved, change, message):
    from transformers import LlamaForCausalLM

    model, folder = saved
    config = type(model.config)(**model.config.to_dict() | change)
    with pytest.raises(ValueError, match=message):
        load(folder, backbone=LlamaForCausalLM(config))


def test_another_backbone_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="was trained on another backbone: parameter"):
        load(folder, backbone=make_backbone("llama", seed=5))
    with pytest.raises(ValueError, match="must be a llama model, got qwen2"):
        load(folder, backbone=make_backbone("qwen2"))


def test_a_file_without_a_backbone_name_asks_for_one(saved):
    with pytest.raises(ValueError, match="pass backbone="):
        load(saved[1])


def test_every_truncation_is_refused(saved):
    _, folder = saved
    backbone = make_backbone("llama")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        whole = (folder / name).read_bytes()
        for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 2}:
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=name):
                load(folder, backbone=backbone)
        (folder / name).write_bytes(whole)
    assert not isinstance(backbone, dh.DualHeadForCausalLM)  # untouched by all of that
    load(folder, backbone=backbone)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_and_other_foreign_files_are_refused(saved, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(folder)
    huge = struct.pack("<Q", 2**40) + b"{}"
    for payload in (pickle.dumps(Bomb()), b"PK\x03\x04" + bytes(64), huge, b"{}" * 100):
        (folder / WEIGHTS_NAME).write_bytes(payload)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load(folder, backbone=make_backbone("llama"))
    torch.save({"reward_head.weight": torch.zeros(1)}, folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(folder, backbone=make_backbone("llama"))
    assert not (folder / "exploded").exists()


def test_tensors_of_other_names_shapes_or_kinds_are_refused(saved):
    from safetensors.torch import load_file, save_file

    _, folder = saved
    state = load_file(folder / WEIGHTS_NAME)
    without = {n: v for n, v in state.items() if n != "gate.out.bias"}
    for bad, message in (
        (without, "missing: gate.out.bias"),
        (state | {"gate.extra": torch.zeros(1)}, "unknown: gate.extra"),
        (state | {"gate.out.bias": torch.zeros(2)}, r"gate.out.bias must be \(1,\), got \(2,\)"),
        (state | {"gate.out.bias": torch.zeros(1).int()}, "must hold floating-point numbers"),
    ):
        save_file(bad, folder / WEIGHTS_NAME)
        with pytest.raises(ValueError, match=message):
            load(folder, backbone=make_backbone("llama"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, "format version 2, this release reads 1"),
        (("dual_head", "colour"), 1, "unknown keys colour"),
        (("dual_head", "gate"), "exec", "gate must be one of"),
        (("backbone",), None, "not a dual-head configuration"),
        (("backbone", "fingerprint"), {}, "not a dual-head configuration"),
        (("backbone", "name_or_path"), "../../etc", "not a hub name"),
        (("backbone", "name_or_path"), "/etc", "not a hub name"),
    ],
)
def test_configurations_that_are_not_ours_are_refused(saved, path, value, message):
    _, folder = saved
    stored = json.loads((folder / CONFIG_NAME).read_text())
    place = stored
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / CONFIG_NAME).write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        load(folder, backbone=None if path[-1] == "name_or_path" else make_backbone("llama"))


def test_only_regular_files_of_the_folder_are_read(saved, tmp_path):
    _, folder = saved
    outside = tmp_path / "outside"
    (folder / WEIGHTS_NAME).rename(outside)
    (folder / WEIGHTS_NAME).symlink_to(outside)
    with pytest.raises(ValueError, match="must be a regular file"):
        load(folder, backbone=make_backbone("llama"))
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="must be a regular file"):  # and does not hang
        load(folder, backbone=make_backbone("llama"))
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {WEIGHTS_NAME}"):
        load(folder, backbone=make_backbone("llama"))
    with pytest.raises(FileNotFoundError, match="is not a folder of heads"):
        load(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_arguments_that_are_refused(saved):
    model, folder = saved
    with pytest.raises(TypeError, match="need save_full=True"):
        model.save_pretrained(folder, max_shard_size="1GB")
    with pytest.raises(ValueError, match="has a gated head already"):
        dh.DualHeadForCausalLM.from_backbone(model)
    with pytest.raises(TypeError, match="must be a model, a path or a hub name"):
        dh.DualHeadForCausalLM.from_backbone(3)
    with pytest.raises(TypeError, match="unknown arguments gate_heads"):
        dh.DualHeadForCausalLM.from_backbone(make_backbone("llama"), gate_heads=3)
    with pytest.raises(ValueError, match="vocab_size is 101 in the backbone, got 7"):
        dh.DualHeadForCausalLM.from_backbone(make_backbone("llama"), vocab_size=7)
