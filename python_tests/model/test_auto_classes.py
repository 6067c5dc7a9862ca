# SPDX-License-Identifier: Apache-2.0
"""A folder of heads with transformers' Auto classes and pipelines."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import dualhead_ext as dh


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "heads"
    model = dh.DualHeadForCausalLM.from_backbone(dh.backbone_path("embedded"))
    model.save_pretrained(folder)
    return folder


def test_the_folder_has_a_config_and_a_model_card(heads):
    assert json.loads((heads / "config.json").read_text()) == {
        "model_type": "dualhead",
        "architectures": ["DualHeadForCausalLM"],
        "dualhead_config": "dualhead_config.json",
    }
    card = (heads / "README.md").read_text()
    # The card must not name a hub's model
    assert "library_name: dualhead_ext" in card and "base_model" not in card
    snippet = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=heads.parent, capture_output=True, text=True
    )
    assert done.returncode == 0 and "How do I keep bread fresh?" in done.stdout, done.stderr


def test_auto_classes(heads):
    assert AutoConfig.from_pretrained(heads).model_type == "dualhead"
    model = AutoModelForCausalLM.from_pretrained(heads)
    assert isinstance(model, dh.DualHeadForCausalLM)
    other = AutoModelForCausalLM.from_pretrained(heads, dtype=torch.bfloat16, quantize="int8")
    assert other.lm_head_module.quantized == "int8"
    tokenizer = AutoTokenizer.from_pretrained(heads)
    plain = AutoTokenizer.from_pretrained(dh.backbone_path("embedded"))
    assert tokenizer("What now?") == plain("What now?")


def test_a_pipeline_steers(heads):
    generate = pipeline("text-generation", model=str(heads))
    text = generate("What now?", strength=1.0, max_new_tokens=4, do_sample=False)
    assert len(text[0]["generated_text"]) > len("What now?")


def test_files_that_are_there_stay(heads, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    dh.DualHeadForCausalLM.from_pretrained(heads).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_whole_folder_is_its_backbone(heads, tmp_path):
    dh.DualHeadForCausalLM.from_pretrained(heads).save_pretrained(tmp_path, save_full=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(plain, dh.DualHeadForCausalLM)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("first", ["dualhead_ext", "transformers"])
def test_whichever_is_imported_first(heads, first):
    second = {"dualhead_ext": "transformers", "transformers": "dualhead_ext"}[first]
    code = f"""
import sys, {first}
assert {first!r} == "transformers" or "transformers" not in sys.modules
import {second}
model = transformers.AutoModelForCausalLM.from_pretrained({str(heads)!r})
assert isinstance(model, dualhead_ext.DualHeadForCausalLM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("alone", ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"])
def test_an_auto_class_without_the_others(heads, alone):
    code = f"""
import dualhead_ext
from transformers import {alone}
print(type({alone}.from_pretrained({str(heads)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("module", ["head_folder", "sharing", "auto", "pretrained", "causal_lm"])
def test_a_module_that_imports_transformers_first(module):
    """The classes are registered while the module is still being imported."""
    code = f"import dualhead_ext.model.{module}, transformers; transformers.AutoTokenizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
