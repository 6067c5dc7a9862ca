# SPDX-License-Identifier: Apache-2.0
"""Small backbones trained from scratch.

Both architectures learn, give the same weights for the same seed, and share a tokenizer.
"""

import dataclasses
import json
import math
import random

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM, MistralForCausalLM

import dualhead_ext as dh
from dualhead_ext.eval.paper import pretraining, trained
from dualhead_ext.eval.paper.settings import BackboneSpec, TrainSettings

TOKENIZER = dh.data.embedded_backbone_path()
SPEC = BackboneSpec(
    hidden_size=32,
    layers=2,
    heads=4,
    intermediate=48,
    context=32,
    batch_size=4,
    max_steps=20,
    learning_rate=1e-2,
)
FAMILIES = {"llama": (LlamaForCausalLM, 4), "mistral": (MistralForCausalLM, 2)}


def dialogues(count=240):
    return [
        f"\n\nHuman: What is {n} and {n % 7}?\n\nAssistant: It is {n + n % 7}, I think."
        for n in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_backbone_from_scratch(tmp_path, architecture):
    spec = dataclasses.replace(SPEC, architecture=architecture)
    out = pretraining.pretrain_backbone(spec, dialogues(), TOKENIZER, tmp_path / "out", seed=3)
    again = pretraining.pretrain_backbone(spec, dialogues(), TOKENIZER, tmp_path / "b", seed=3)
    other = pretraining.pretrain_backbone(spec, dialogues(), TOKENIZER, tmp_path / "c", seed=4)
    digests = [trained.weights_digest(folder) for folder in (out, again, other)]
    assert digests[0] == digests[1] != digests[2]
    model = trained.load_policy(out)
    family, kv_heads = FAMILIES[architecture]
    assert isinstance(model, family) and model.config.num_key_value_heads == kv_heads
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["steps"] == 20 and recipe["parameters"] == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TOKENIZER).get_vocab()
    # The recipe's loss on held-out text is that of the saved files, up to bf16 rounding.
    held = [t for t in dialogues() if pretraining.is_held_out(t)]
    ids = [[*i, tokenizer.eos_token_id] for i in tokenizer(held)["input_ids"]]
    rows = pretraining.pack(ids, random.Random(1), spec.context)
    loss = pretraining.validation_loss(model, rows)
    assert loss == pytest.approx(recipe["validation_loss_nats_per_token"], rel=2e-3)
    assert loss < 0.8 * math.log(len(tokenizer))  # a uniform guess has a loss of log V
    prompt = tokenizer(held[0][:30], return_tensors="pt")
    written = model.eval().generate(**prompt, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_every_token_of_the_text_is_packed_once():
    ids = [list(range(n, n + 5)) for n in range(0, 500, 5)]
    rows = pretraining.pack(ids, random.Random(0), 16)
    flat = rows.flatten().tolist()
    assert rows.shape[1] == 17 and len(set(flat)) == len(flat) >= 500 - 2 * 17
    assert pretraining.pack(ids, random.Random(0), 16).equal(rows)


def test_near_copies_of_a_prompt_stay_on_one_side():
    prompt = "\n\nHuman: Hello there\n\nAssistant:"
    sides = {pretraining.is_held_out(prompt + answer) for answer in (" Hi", " Go", "", " No")}
    assert len(sides) == 1
    share = sum(map(pretraining.is_held_out, dialogues(4000))) / 4000
    assert 0.03 < share < 0.07


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of 32 tokens"):
        pretraining.pretrain_backbone(SPEC, dialogues(8), TOKENIZER, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_loud(tmp_path, monkeypatch):
    real = pretraining.loss_of
    monkeypatch.setattr(pretraining, "loss_of", lambda *a: real(*a) * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        pretraining.pretrain_backbone(SPEC, dialogues(), TOKENIZER, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, wrong, message",
    [
        (BackboneSpec, {"architecture": "rnn"}, "one of llama, mistral"),
        (BackboneSpec, {"layers": 0}, "layers must be above 0"),
        (BackboneSpec, {"heads": 3}, "heads must divide hidden_size"),
        (BackboneSpec, {"context": 1024}, "context must be below"),
        (TrainSettings, {"learning_rate": 0.0}, "learning_rate must be above 0"),
        (TrainSettings, {"learning_rate": float("nan")}, "learning_rate must be above 0"),
        (TrainSettings, {"max_length": 1}, "max_length must be at least 2"),
        (TrainSettings, {"micro_batch_size": 3}, "must divide batch_size 16"),
    ],
)
def test_settings_out_of_range(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)
    json.dumps(kind().to_dict())
