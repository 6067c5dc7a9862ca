# SPDX-License-Identifier: Apache-2.0
"""The backbone in the package: its size, its files, and the loss that its recipe states."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import load_preference_data

PATH = dh.data.embedded_backbone_path()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PATH)


def test_it_fits_the_package():
    files = {file.name: file.stat().st_size for file in PATH.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.json"} <= set(files)
    assert sum(files.values()) <= 12e6


@pytest.mark.parametrize(
    "text", ["\n\nHuman: Hi\n\nAssistant:", "naïve \u2019 😀\t\0 漢字", " ", ""]
)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and max(ids) < len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_its_loss_on_unseen_dialogues_is_near_the_recipes(tokenizer):
    """None of its training data has a prompt of the sample's test pairs."""
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)
    rows = load_preference_data("embedded", "test")[:24]
    ids = tokenizer(
        [row["prompt"] + row["chosen"] for row in rows], return_tensors="pt", padding=True
    )
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = model(**ids, labels=labels).loss
    recipe = json.loads((PATH / "recipe.json").read_text())
    assert model.num_parameters() == recipe["parameters"]
    assert abs(float(loss) - recipe["validation_loss_nats_per_token"]) < 0.4
