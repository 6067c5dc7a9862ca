# SPDX-License-Identifier: Apache-2.0
"""The folder that engines serve.

It is complete, and a program that does not know the heads can load it as a plain backbone.
python_tests/vllm_plugin tests it with vLLM.
"""

import json
import os

import pytest
import torch
from command_line import run
from safetensors import safe_open
from tiny_models import make_backbone, make_model, prompts
from transformers import AutoModelForCausalLM

import dualhead_ext as dh
from dualhead_ext.model.export import export
from dualhead_ext.model.served_folder import ARCHITECTURES, INDEX, holds_backbone

FAMILIES = ("llama", "llama-tied", "mistral-sliding", "qwen2", "qwen3", "gemma2-softcap", "gemma3")


def saved(folder, family="llama", quantize=None, shards=False, **config):
    """(folder of the heads, folder of the backbone)."""
    heads, backbone = folder / "heads", folder / "backbone"
    plain = make_backbone(family)
    plain.save_pretrained(backbone, **{"max_shard_size": "20KB"} if shards else {})
    (backbone / "tokenizer_config.json").write_text("{}")
    model = make_model(family, **config)
    if quantize is not None:
        model.quantize(quantize)
    model.save_pretrained(heads)
    return heads, backbone


@pytest.mark.parametrize("family", [*FAMILIES, "granite-scale"])
def test_the_folder_is_the_backbone_with_heads(family, tmp_path):
    heads, backbone = saved(tmp_path, family)
    folder = export(heads, tmp_path / "served", backbone)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[config["model_type"]][0]]
    assert (folder / "tokenizer_config.json").is_file()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not isinstance(plain, dh.DualHeadForCausalLM)
    inputs = prompts()
    want = AutoModelForCausalLM.from_pretrained(backbone)(**inputs).logits
    torch.testing.assert_close(plain(**inputs).logits, want, rtol=0, atol=0)
    # The export contains its own backbone, so the heads' original backbone need not be found.
    gated = dh.DualHeadForCausalLM.from_pretrained(folder, trial=False)
    want = dh.DualHeadForCausalLM.from_pretrained(heads, backbone=backbone, trial=False)
    torch.testing.assert_close(gated(**inputs).logits, want(**inputs).logits, rtol=0, atol=0)


def test_shards_are_links_and_the_index_lists_the_backbones_tensors_alone(tmp_path):
    heads, backbone = saved(tmp_path, shards=True)
    folder = export(heads, tmp_path / "served", backbone)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = set(weight_map.values())
    assert len(shards) > 1 and not any("dualhead" in shard for shard in shards)
    for shard in shards:
        assert os.path.samefile(folder / shard, backbone / shard)
        with safe_open(folder / shard, "pt") as file:
            assert all(weight_map[name] == shard for name in file.keys())
    symbolic = export(heads, tmp_path / "links", backbone, symbolic=True)
    assert all((symbolic / shard).is_symlink() for shard in shards)


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    heads, backbone = saved(tmp_path)

    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = export(heads, tmp_path / "served", backbone)
    copy, own = folder / "model.safetensors", backbone / "model.safetensors"
    assert copy.read_bytes() == own.read_bytes() and not os.path.samefile(copy, own)


def test_what_cannot_be_served_is_refused_and_leaves_nothing(tmp_path):
    heads, backbone = saved(tmp_path)
    output = tmp_path / "served"
    for case, wrong in (
        ({"quantize": "int8"}, "in int8"),
        ({"family": "gpt2", "gate": "linear"}, "'gpt2' cannot be served"),
    ):
        own, of_own = saved(tmp_path / case.get("family", "int8"), **case)
        with pytest.raises(ValueError, match=wrong):
            export(own, output, of_own)
    with pytest.raises(ValueError, match="must be a llama model"):
        export(heads, output, saved(tmp_path / "qwen2", "qwen2")[1])
    trained = make_model("llama")
    trained.lm_head_module.weight.requires_grad_(True)
    trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="LM head that was trained"):
        export(tmp_path / "trained", output, backbone)
    foreign = make_backbone("llama", seed=5)
    foreign.save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="was trained on another backbone"):
        export(heads, output, tmp_path / "foreign")
    (backbone / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no safetensors"):
        export(heads, output, backbone)
    assert not [path for path in tmp_path.iterdir() if "served" in path.name]


def test_an_output_that_holds_something_stays(tmp_path):
    heads, backbone = saved(tmp_path)
    with pytest.raises(ValueError, match="must be a new folder"):
        export(heads, backbone, backbone)
    assert (backbone / "model.safetensors").is_file()
    (tmp_path / "empty").mkdir()
    assert holds_backbone(export(heads, tmp_path / "empty", backbone))
    assert not holds_backbone(heads) and not holds_backbone(backbone)


def test_the_command(tmp_path, capsys):
    heads, backbone = saved(tmp_path)
    served = str(tmp_path / "served")
    words = ["export", str(heads), "--backbone", str(backbone), "--output", served]
    assert run(*words) == 0
    assert f"dualhead serve {served}" in capsys.readouterr().out
    assert run(*words) == 2
    assert capsys.readouterr().err.startswith("dualhead export: export: ")
    assert run("serve", served, "--engine", "vllm") == 2
    assert "vLLM is not installed" in capsys.readouterr().err
