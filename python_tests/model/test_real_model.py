# SPDX-License-Identifier: Apache-2.0
"""The main use on a real chat model: attach, train, save, load, generate, stream, quantise,
evaluate.

The commands are tested too. The model is SmolLM2-135M-Instruct (d = 576, V = 49152, tied
embeddings, a chat template).
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.data import load_preference_data
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME
from dualhead_ext.train.presets import PRESETS

QUESTIONS = ("What is the capital of France?", "Name three colours.", "How do I boil an egg?")
STRENGTHS = (0.0, 0.5, 1.0, 2.0)
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def rows(split, count):
    """Short pairs, so that a step takes a second."""
    pairs = [r for r in load_preference_data("embedded", split) if len(r["prompt"]) < 200]
    return [r for r in pairs if max(len(r["chosen"]), len(r["rejected"])) < 120][:count]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2, padding_side="left")


@pytest.fixture(scope="module")
def backbone(smollm2):
    """The unchanged backbone, for comparison."""
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def asked(tokenizer, *questions):
    """A padded batch of questions in the chat template."""
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )


@pytest.fixture(scope="module", params=["default", pytest.param("paper", marks=pytest.mark.slow)])
def trained(request, smollm2, tokenizer, tmp_path_factory):
    """(preset, trainer, folder of the saved heads) after 20 steps on eight pairs."""
    preset, folder = request.param, tmp_path_factory.mktemp("smollm2")
    torch.manual_seed(0)
    model = dh.DualHeadForCausalLM.from_backbone(
        "smollm2", dtype=torch.float32, **PRESETS[preset]["head"]
    )
    arguments = dh.DualHeadTrainingArguments(
        output_dir=str(folder / "run"),
        preset=preset,
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-2 if preset == "default" else 1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_length=128,
        logging_steps=5,
        save_steps=20,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = dh.DualHeadTrainer(
        model,
        arguments,
        train_dataset=rows("train", 8),
        eval_dataset=rows("test", 8),
        processing_class=tokenizer,
    )
    trainer.train()
    model.eval().save_pretrained(folder / "heads")
    return preset, trainer, folder / "heads"


def test_training_learns_the_pairs_and_leaves_the_backbone(trained, backbone):
    preset, trainer, _ = trained
    logs = [entry for entry in trainer.state.log_history if "preference_loss" in entry]
    assert logs[-1]["preference_loss"] < 0.9 * logs[0]["preference_loss"]
    plain, own = dict(backbone.named_parameters()), dict(trainer.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in plain.items())
    assert {n for n, v in own.items() if v.requires_grad} == own.keys() - plain.keys()
    state = trainer.model.state_dict()
    moved = "lm_head.gate.out.weight" if preset == "paper" else "lm_head.reward_head.bias"
    assert state[moved].abs().max() > 0  # it starts at zero


def test_heads_come_back_by_the_backbones_name(trained, tokenizer):
    preset, trainer, folder = trained
    stored = json.loads((folder / CONFIG_NAME).read_text())
    assert stored["backbone"]["name_or_path"] == "smollm2"
    again = dh.DualHeadForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = asked(tokenizer, *QUESTIONS)
    own, read = (model.lm_head.state_dict() for model in (trainer.model, again))
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) for name in own)
    with torch.no_grad():  # training and decoding round differently in fp32
        expected = trainer.model(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-4, atol=1e-3)
    assert again.dual_head_config == trainer.model.dual_head_config
    if preset == "default":
        assert again.dual_head_config.kl_curve  # training has calibrated its strength
    else:
        checkpoint = folder.parent / "run" / "checkpoint-20"
        assert (checkpoint / WEIGHTS_NAME).read_bytes() == (folder / WEIGHTS_NAME).read_bytes()


def test_four_strengths_in_one_batch(trained, tokenizer, backbone):
    model = trained[1].model
    one = asked(tokenizer, QUESTIONS[0])
    batch = {name: value.repeat(len(STRENGTHS), 1) for name, value in one.items()}
    together = model.generate(**batch, **GREEDY, strength=torch.tensor(STRENGTHS))
    for strength, ids in zip(STRENGTHS, together, strict=True):
        alone = model.generate(**one, **GREEDY, strength=strength)[0]
        assert torch.equal(ids[: len(alone)], alone)
        assert (ids[len(alone) :] == tokenizer.pad_token_id).all()
    plain = backbone.generate(**one, **GREEDY)[0]
    assert torch.equal(together[0, : len(plain)], plain)
    text = tokenizer.decode(together[0, one["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_a_stream_is_the_text(trained, tokenizer):
    model, inputs = trained[1].model, asked(tokenizer, QUESTIONS[1])
    ids = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **GREEDY, streamer=streamer)
    pieces = list(streamer)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) > 3


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantised_heads_say_nearly_the_same(trained, tokenizer, backbone, name, tmp_path):
    preset, trainer, folder = trained
    model = dh.DualHeadForCausalLM.from_pretrained(folder, dtype=torch.float32, quantize=name)
    inputs = asked(tokenizer, *QUESTIONS)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        full = trainer.model(**inputs).logits[keep].log_softmax(-1)
        got = model(**inputs).logits[keep].log_softmax(-1)
    kl = (full.exp() * (full - got)).sum(-1).mean()
    assert 0 < kl < (0.01 if name == "int8" else 0.05)
    model.save_pretrained(tmp_path)
    if preset == "paper":
        size = (tmp_path / WEIGHTS_NAME).stat().st_size
        assert size < 0.6 * (folder / WEIGHTS_NAME).stat().st_size
    again = dh.DualHeadForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(again.generate(**inputs, **GREEDY), expected)


def test_int4_says_why_it_does_not_fit(trained):
    with pytest.raises(
        ValueError, match=r"int4 needs a hidden size that is a multiple of 128.*576"
    ):
        dh.DualHeadForCausalLM.from_pretrained(trained[2], quantize="int4")


def test_evaluation_counts_every_pair(trained):
    metrics = trained[1].evaluate()
    assert all(torch.isfinite(torch.tensor(float(value))) for value in metrics.values())
    assert metrics["eval_rewards/accuracies"] * 8 == pytest.approx(
        round(metrics["eval_rewards/accuracies"] * 8)
    )


def test_the_commands_from_end_to_end(smollm2, tmp_path, capsys):
    data, heads = tmp_path / "pairs.jsonl", tmp_path / "heads"
    data.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows("train", 6)))
    options = ["--max-steps", "2", "--batch-size", "2", "--accumulate", "1", "--max-length", "128"]
    train = ["train", "--backbone", "smollm2", "--data", str(data), "--output", str(heads)]
    assert cli.main([*train, *options, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f'dualhead generate {heads} "How are you?" --show-gate' in shown.replace("'", '"')
    ask = ["generate", str(heads), QUESTIONS[0], "--max-new-tokens", "12", "--device", "cpu"]
    assert cli.main([*ask, "--strength", "0"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert cli.main([*ask, "--show-gate"]) == 0
    assert "alpha" in capsys.readouterr().out
