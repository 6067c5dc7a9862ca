# SPDX-License-Identifier: Apache-2.0
"""Files of heads: restored bit for bit, their versions, and the arguments of saving."""

import dataclasses
import json
import os
from pathlib import Path

import head_forging
import pytest
import torch
from tiny_models import FAMILIES, make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext.model.fingerprint import fingerprint
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME, read_head_folder

FILES = sorted(["README.md", "config.json", CONFIG_NAME, WEIGHTS_NAME])
GREEDY = {"max_new_tokens": 5, "do_sample": False}
load = dh.DualHeadForCausalLM.from_pretrained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
def test_round_trip_is_bit_for_bit(family, gate, tmp_path):
    model = make_model(family, gate=gate, num_objectives=2, mix="probs")
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
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
    model = dh.DualHeadForCausalLM.from_backbone(
        kind(dh.data.embedded_backbone_path()), reward_head="full", gate="attention"
    )
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


def test_a_hub_name_does_not_pick_up_a_folder_of_the_working_directory(
    saved, tmp_path, monkeypatch
):
    _, folder = saved
    stored = head_forging.read(folder)
    stored["backbone"]["name_or_path"] = "someone/model"
    head_forging.write(folder, stored)
    make_backbone("llama").save_pretrained(tmp_path / "someone" / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'someone/model' of the hub, but the working directory"):
        load(folder)
    load(folder, backbone="someone/model")


@pytest.mark.parametrize("name", ["./model", "no such folder", "/gone/model"])
def test_no_path_of_this_machine_is_stored(tmp_path, name):
    model = make_model("llama")
    model.config._name_or_path = name
    model.save_pretrained(tmp_path)
    assert head_forging.read(tmp_path)["backbone"]["name_or_path"] is None


def version_1(folder):
    """Turn a saved folder into one as release 0.1.0 wrote it."""
    stored = head_forging.read(folder)
    old = ("gate", "gate_num_heads", "gate_head_dim", "gate_alpha", "mix", "num_objectives", "bias")
    old = (*old, "hidden_size", "vocab_size", "logit_scale", "logit_softcap")
    stored["dual_head"] = {name: stored["dual_head"][name] for name in old}
    del stored["sha256"], stored["weights_sha256"]
    head_forging.write(folder, stored | {"format_version": 1})


def test_version_1_loads_as_what_it_meant_with_a_warning(tmp_path, caplog):
    model = make_model("llama", num_objectives=2)
    model.save_pretrained(tmp_path)
    version_1(tmp_path)
    again = load(tmp_path, backbone=make_backbone("llama"))
    assert "was saved without hashes" in caplog.text
    for name, value in (("reward_head", "full"), ("preference", "log_prob"), ("kl_curve", None)):
        assert getattr(again.dual_head_config, name, value) == value
    expected = model.lm_head_module.state_dict()
    state = again.lm_head_module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    caplog.clear()
    again.save_pretrained(tmp_path)
    assert head_forging.read(tmp_path)["format_version"] == 2
    load(tmp_path, backbone=make_backbone("llama"))
    assert not caplog.text


def test_a_change_by_hand_is_named_and_can_be_made(saved, caplog):
    _, folder = saved
    stored = head_forging.read(folder)
    stored["backbone"]["name_or_path"] = "someone/model"
    (folder / CONFIG_NAME).write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r'changed after it was saved.* remove the key "sha256"'):
        load(folder, backbone=make_backbone("llama"))
    del stored["sha256"]
    (folder / CONFIG_NAME).write_text(json.dumps(stored))
    load(folder, backbone=make_backbone("llama"))


def test_every_field_of_the_configuration_comes_back(tmp_path):
    model = make_model("llama", gate="fixed", gate_alpha=0.25, mix="probs", num_objectives=2)
    model.save_pretrained(tmp_path)
    stored, _ = read_head_folder(tmp_path)
    assert stored["dual_head"] == model.dual_head_config
    assert set(head_forging.read(tmp_path)["dual_head"]) == {
        field.name for field in dataclasses.fields(dh.DualHeadConfig)
    }


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_heads_that_are_not_finite_are_not_saved(saved):
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with torch.no_grad():
        model.lm_head.reward_head.weight[0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"reward_head.weight must be finite"):
        model.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_the_arguments_that_trainer_trl_and_accelerate_pass(tmp_path):
    """accelerate's documented call as it stands, then the effect of each argument."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), make_model("llama")
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "recipe",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    read_head_folder(tmp_path / "recipe")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(tmp_path / "other", safe_serialization=False)
    assert not (tmp_path / "other").exists()

    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    gathered["lm_head.reward_head.weight"] += 1
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered, safe_serialization=True)
    state = read_head_folder(tmp_path / "gathered")[1]
    assert torch.equal(state["reward_head.weight"], gathered["lm_head.reward_head.weight"])
    del gathered["lm_head.reward_head.weight"]
    with pytest.raises(ValueError, match=r"state_dict must hold .*reward_head.weight are missing"):
        model.save_pretrained(tmp_path / "less", state_dict=gathered)
    assert not (tmp_path / "less").exists()


def test_pushing_to_the_hub_uploads_the_files(tmp_path, monkeypatch):
    import huggingface_hub
    import transformers.utils.hub as hub

    uploaded = []
    url = huggingface_hub.RepoUrl("https://huggingface.co/someone/heads")
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: url)
    monkeypatch.setattr(
        hub.PushToHubMixin,
        "_upload_modified_files",
        lambda self, folder, repo, before, **o: uploaded.append(
            (sorted(os.listdir(folder)), repo, o)
        ),
    )
    model = make_model("llama")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/heads", commit_message="new")
    expected = (
        FILES,
        "someone/heads",
        {"token": None, "commit_message": "new"},
    )
    assert uploaded == [expected]


def test_an_adapter_on_the_backbone_is_not_dropped_without_a_word(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    plain = fingerprint(model)
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj"], r=2)
    model.add_adapter(config, "mine")
    model.save_pretrained(tmp_path)
    assert "adapters (mine), which the heads' files do not contain" in caplog.text
    assert fingerprint(model) == plain  # the adapter does not change the backbone's fingerprint
    load(tmp_path, backbone=make_backbone("llama"))


def test_arguments_that_are_refused(saved):
    model, folder = saved
    with pytest.raises(TypeError, match="save_pretrained: unknown arguments max_shards"):
        model.save_pretrained(folder, max_shards=3)
    with pytest.raises(ValueError, match="variant is for the backbone: it needs save_full"):
        model.save_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match="has a gated head already"):
        dh.DualHeadForCausalLM.from_backbone(model, reward_head="full", gate="attention")
    with pytest.raises(TypeError, match="must be a model, a path or a hub name"):
        dh.DualHeadForCausalLM.from_backbone(3, reward_head="full", gate="attention")
    with pytest.raises(TypeError, match="unknown arguments gate_heads"):
        dh.DualHeadForCausalLM.from_backbone(
            make_backbone("llama"), gate_heads=3, reward_head="full", gate="attention"
        )
    with pytest.raises(ValueError, match="vocab_size is 101 in the backbone, got 7"):
        dh.DualHeadForCausalLM.from_backbone(
            make_backbone("llama"), vocab_size=7, reward_head="full", gate="attention"
        )


def test_arguments_of_from_pretrained(tmp_path):
    make_backbone("llama").save_pretrained(tmp_path)
    model = dh.DualHeadForCausalLM.from_backbone(
        tmp_path,
        attn_implementation="eager",
        dtype=torch.bfloat16,
        gate_num_heads=2,
        reward_head="full",
        gate="attention",
    )
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    assert model.dual_head_config.gate_num_heads == 2
    with pytest.raises(TypeError, match="no_such_option"):
        dh.DualHeadForCausalLM.from_backbone(
            tmp_path, no_such_option=1, reward_head="full", gate="attention"
        )
    with pytest.raises(TypeError, match="unknown arguments attn_implementation"):
        dh.DualHeadForCausalLM.from_backbone(
            make_backbone("llama"),
            attn_implementation="eager",
            reward_head="full",
            gate="attention",
        )
    model.save_pretrained(tmp_path / "heads")
    again = dh.DualHeadForCausalLM.from_pretrained(
        tmp_path / "heads", backbone=tmp_path, attn_implementation="eager"
    )
    assert again.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="unknown arguments attn_implementation"):
        dh.DualHeadForCausalLM.from_pretrained(
            tmp_path / "heads", backbone=make_backbone("llama"), attn_implementation="eager"
        )
