# SPDX-License-Identifier: Apache-2.0
"""DualHeadTrainer: which parameters train, the loss across batches, metrics, options."""

import json
import logging
import math

import pytest
import torch
from loss_cases import Products
from tiny_models import make_backbone, make_model
from torchrun import run_in_two_processes
from trainer_cases import arguments, heads, make_trainer, pairs, same
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import embedded_backbone_path
from dualhead_ext.data.collate import PreferenceCollator
from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss import products as loss_products
from dualhead_ext.loss.terms import TOTAL_NAMES


def test_learns_preferences_of_unseen_pairs(tmp_path):
    model = dh.DualHeadForCausalLM.from_backbone(
        make_backbone("llama"),
        gate_num_heads=2,
        gate_head_dim=6,
        reward_head="full",
        gate="attention",
    )
    options = {"learning_rate": 0.02, "pref_reduction": "mean", "beta_r": 2.0, "logging_steps": 50}
    data, unseen = pairs(160), pairs(60, seed=9)
    trainer = make_trainer(tmp_path, model, data, unseen, num_train_epochs=3, **options)
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert before["eval_rewards/accuracies"] < 0.65 < 0.85 < after["eval_rewards/accuracies"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert after["eval_lm_loss"] < before["eval_lm_loss"]


def test_the_heads_train_and_nothing_else_does(tmp_path):
    model = make_model("llama").requires_grad_(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n in before if "reward_head" in n or ".gate." in n}
    assert changed == trained and len(trained) == 7
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_the_backbone_is_in_eval_mode_while_training(tmp_path):
    """The model has dropout, but the loss of the first step is that of an evaluation."""
    model = make_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    data = pairs(4)
    trainer = make_trainer(tmp_path, model, data, data, max_steps=1)
    expected = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected, rel=1e-6)


def test_backbone_gradients_are_never_computed(tmp_path):
    model = make_model("llama")
    make_trainer(tmp_path, model, max_steps=2).train()
    assert all(p.grad is None for n, p in model.named_parameters() if "lm_head." not in n)


# --- the loss across batches and processes --------------------------------------------------------


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_accumulation_does_not_change_a_step(tmp_path, reduction):
    """1 x 6 = 3 x 2 = 2 x 3 = 6 x 1, including the last, smaller window of an epoch."""
    results = {}
    for size, count in ((6, 1), (3, 2), (2, 3), (1, 6)):
        model = make_model("llama")
        trainer = make_trainer(
            tmp_path,
            model,
            pairs(10),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            optim="sgd",
            lm_reduction=reduction,
            lambda_g=0.5,
            max_grad_norm=0.0,
        )
        trainer.train()
        logs = [entry | {"epoch": 0.0} for entry in trainer.state.log_history[:2]]
        results[size] = (heads(model), logs)
    weights, logs = results[6]
    for size in (3, 2, 1):
        for name in weights:
            torch.testing.assert_close(results[size][0][name], weights[name], rtol=1e-4, atol=1e-6)
        for step in range(2):
            assert results[size][1][step] == pytest.approx(logs[step], rel=1e-4, abs=1e-6)
    start = heads(make_model("llama"))
    head = next(n for n in weights if "reward_head" in n)
    assert (weights[head] - start[head]).abs().max() > 1e-3


def test_one_step_is_the_gradient_of_the_loss(tmp_path):
    model, data = make_model("llama"), pairs(4)
    batch = PreferenceCollator(0)(data)
    head = model.lm_head_module
    hidden = model.get_decoder()(batch["input_ids"], batch["attention_mask"])[0]
    out = dual_head_loss(
        hidden[:, :-1],
        batch["input_ids"][:, 1:],
        batch["completion_mask"][:, 1:].bool(),
        head.gate(hidden, batch["attention_mask"])[:, :-1],
        lm_weight=head.lm_weight,
        reward_weight=head.reward_head.weight,
        beta_r=0.7,
        lambda_g=0.3,
    )
    out.loss.backward()
    expected = head.reward_head.weight - 0.01 * head.reward_head.weight.grad
    expected = expected.detach().clone()
    head.zero_grad()
    changes = {"beta_r": 0.7, "lambda_g": 0.3, "learning_rate": 0.01, "optim": "sgd"}
    constant = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    trainer = make_trainer(tmp_path, model, data, **changes | constant)
    trainer.train()
    torch.testing.assert_close(head.reward_head.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_to_the_bit(tmp_path):
    """DDP with gloo and find_unused_parameters=False.

    The weights are those of one process with the same global batch. Each pair is evaluated once. An
    interrupted run resumes with the same bits.
    """
    run_in_two_processes("ddp_training.py", tmp_path)
    two = json.loads((tmp_path / "result.json").read_text())
    assert two["find_unused_parameters"] is False and two["resumed_equal"] is True
    with pytest.raises(ValueError, match="the number of rows a step was 8, is 4"):
        trainer = make_trainer(tmp_path / "again", data=pairs(16))
        trainer.train(resume_from_checkpoint=True)

    model = make_model("llama")
    trainer = make_trainer(
        tmp_path / "one",
        model,
        pairs(16),
        pairs(7, seed=5),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        optim="sgd",
        max_grad_norm=0.0,
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name, tensor in heads(model).items():
        got = torch.tensor(two["heads"][name], dtype=tensor.dtype)
        torch.testing.assert_close(got, tensor, rtol=1e-3, atol=1e-5)
    clock = ("runtime", "per_second", "preparation_time")
    for name, value in metrics.items():
        if not any(word in name for word in clock):
            assert two["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for ours, theirs in zip(trainer.state.log_history[:3], two["logs"][:3], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert theirs["rewards/margins"] == pytest.approx(ours["rewards/margins"], abs=1e-3)


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_metrics_are_those_of_one_pair_at_a_time(tmp_path, batch_size):
    model, data = make_model("llama"), pairs(7, seed=4)
    options = {"beta_r": 0.3, "gamma": 0.2, "lm_reduction": "mean"}
    trainer = make_trainer(
        tmp_path, model, eval_data=data, per_device_eval_batch_size=batch_size, **options
    )
    got = trainer.evaluate()
    slow = {"chosen": 0.0, "rejected": 0.0, "correct": 0, "nll": 0.0, "tokens": 0}
    alphas, pair_losses = [], []
    with torch.no_grad():
        for row in data:
            rewards = {}
            for side in ("chosen", "rejected"):
                ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
                start = len(row["prompt_ids"])
                hidden = model.get_decoder()(ids)[0][:, start - 1 : -1]
                head, labels = model.lm_head_module, ids[:, start:, None]
                gate_logit = head.gate(model.get_decoder()(ids)[0])[:, start - 1 : -1]
                z = hidden @ head.reward_head.weight[0].T
                logps = torch.log_softmax(z, -1).gather(-1, labels).sum().item()
                slow[side], rewards[side] = slow[side] + logps, 0.3 * logps
                alphas += torch.sigmoid(gate_logit).flatten().tolist()
                if side == "chosen":
                    mixed = torch.log_softmax(model(ids).logits, -1)[:, start - 1 : -1]
                    slow["nll"] -= mixed.gather(-1, labels).sum().item()
                    slow["tokens"] += labels.numel()
            margin = rewards["chosen"] - rewards["rejected"] - 0.2
            pair_losses.append(math.log1p(math.exp(-margin)))
            slow["correct"] += rewards["chosen"] > rewards["rejected"]
    expected = {
        "logps/chosen": slow["chosen"] / 7,
        "logps/rejected": slow["rejected"] / 7,
        "rewards/chosen": 0.3 * slow["chosen"] / 7,
        "rewards/margins": 0.3 * (slow["chosen"] - slow["rejected"]) / 7,
        "rewards/accuracies": slow["correct"] / 7,
        "lm_loss": slow["nll"] / slow["tokens"],
        "preference_loss": sum(pair_losses) / 7,
        "gate/mean": sum(alphas) / len(alphas),
        "gate/std": torch.tensor(alphas).std(unbiased=False).item(),
    }
    histogram = torch.histc(torch.tensor(alphas), 10, 0, 1) / len(alphas)
    for i, share in enumerate(histogram.tolist()):
        expected[f"gate/histogram/{i / 10:.1f}-{(i + 1) / 10:.1f}"] = share
    for name, value in expected.items():
        assert got[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    total = got["eval_lm_loss"] + got["eval_preference_loss"] + got["eval_gate_loss"]
    assert got["eval_loss"] == pytest.approx(total)


def test_predictions_are_the_totals_of_each_pair(tmp_path):
    trainer = make_trainer(tmp_path, eval_data=pairs(5))
    output = trainer.predict(pairs(5))
    assert output.predictions.shape == (5, len(TOTAL_NAMES))
    correct = output.predictions[:, TOTAL_NAMES.index("correct_pairs")]
    assert output.metrics["test_rewards/accuracies"] == correct.mean()


def test_logs_average_over_the_window(tmp_path):
    """Logging every 3 steps gives the mean of logging every step, weighted by examples."""
    every = make_trainer(tmp_path, logging_steps=1)
    every.train()
    third = make_trainer(tmp_path, logging_steps=3)
    third.train()
    one, three = every.state.log_history[:3], third.state.log_history[0]
    assert three["step"] == 3
    for name in ("rewards/accuracies", "rewards/margins", "lm_loss", "preference_loss"):
        mean = sum(entry[name] for entry in one) / 3  # each step has 4 pairs
        assert three[name] == pytest.approx(mean, rel=1e-6), name
    total = three["lm_loss"] + three["preference_loss"] + three["gate_loss"]
    assert three["loss"] == pytest.approx(total)


def test_a_nan_is_not_hidden(tmp_path):
    model = make_model("llama")
    trainer = make_trainer(tmp_path, model, max_steps=1)
    with torch.no_grad():
        model.lm_head_module.reward_head.weight[0, 60, 0] = math.nan
    trainer.train()
    assert math.isnan(trainer.state.log_history[0]["loss"])


def test_a_collapsed_gate_is_announced_once(tmp_path, caplog):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head_module.gate.out_bias.fill_(12.0)
    trainer = make_trainer(tmp_path, model, max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "gate has collapsed" in r.getMessage()]
    assert len(said) == 1 and "above 0.99 for 100 %" in said[0]
    assert trainer.state.log_history[0]["gate/saturation"] > 0.9


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_every_model_trains(tmp_path, gate, mix):
    model = make_model("llama", gate=gate, mix=mix, num_objectives=2)
    before = heads(model) or {n: p.clone() for n, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model, pairs(8, objectives=2), max_steps=2)
    before = heads(model)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:2])
    assert not any(torch.equal(before[name], tensor) for name, tensor in heads(model).items())


@pytest.mark.parametrize(
    "option",
    [
        {"beta_r": 0.9},
        {"lambda_r": 0.1},
        {"lambda_g": 2.0},
        {"gate_regularizer": "entropy_as_printed"},
        {"lm_reduction": "mean"},
        {"pref_on": "mixed"},
        {"pref_reduction": "mean"},
        {"gamma": 1.0},
        {"label_smoothing": 0.3},
        {"lm_on_chosen": False},
        {"objective_weights": [0.2, 0.9]},
    ],
)
def test_every_option_reaches_the_loss(tmp_path, option):
    model = make_model("llama", num_objectives=2)
    data = pairs(6, objectives=2)
    plain = make_trainer(tmp_path, model, data, data).evaluate()["eval_loss"]
    assert make_trainer(tmp_path, model, data, data, **option).evaluate()["eval_loss"] != plain


def test_bf16_backbone_heads_in_fp32_products_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_products, "narrow_pays", lambda device, dtype: True)
    model = make_model("llama").to(torch.bfloat16)
    trainer = make_trainer(tmp_path, model, max_steps=2, bf16=True)
    assert {p.dtype for p in heads(model).values()} == {torch.float32}
    before = heads(model)
    with Products() as products:
        trainer.train()
    of_heads = {dtype for dtype, *_, shape in products.seen if 101 in shape}
    assert of_heads == {torch.bfloat16}
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history[:2])
    assert not same(before, heads(model))


def test_the_lm_head_trains_when_asked(tmp_path):
    model = make_model("llama")
    trainer = make_trainer(tmp_path, model, train_lm_head=True, max_steps=2)
    before = model.lm_head_module.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, model.lm_head_module.weight)
    trainer.save_model()
    backbone = make_backbone("llama")
    loaded = dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=backbone)
    assert torch.equal(loaded.lm_head_module.weight, model.lm_head_module.weight)


def test_a_tied_lm_head_is_not_trained_unless_untied(tmp_path):
    model = make_model("llama-tied")
    with pytest.raises(ValueError, match=r"shares its weight with the embedding.*untie"):
        make_trainer(tmp_path, model, train_lm_head=True)
    embedding = model.get_input_embeddings().weight.detach().clone()
    make_trainer(tmp_path, model, train_lm_head=True, untie=True, max_steps=2).train()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not torch.equal(model.lm_head_module.weight, embedding)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    for folder in (first, second):  # load, save, load again: the embedding stays the same
        backbone = make_backbone("llama-tied")
        loaded = dh.DualHeadForCausalLM.from_pretrained(folder, backbone=backbone)
        assert torch.equal(loaded.lm_head_module.weight, model.lm_head_module.weight)
        assert torch.equal(loaded.get_input_embeddings().weight, embedding)
        loaded.save_pretrained(second)


def test_a_low_precision_lm_head_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match="LM head must be float32, got torch"):
        make_trainer(tmp_path, make_model("llama").bfloat16(), train_lm_head=True)


@pytest.mark.parametrize("cache", [None, "memory"])
def test_batches_of_similar_lengths(tmp_path, cache):
    rows = pairs(24)
    options = {"train_sampling_strategy": "group_by_length", "max_steps": 2, "cache_hidden": cache}
    trainer = make_trainer(tmp_path, data=rows, **options)
    trainer.train()
    longest = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in rows
    ]
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(24)) and longest[order[0]] == max(longest)
    batches = [[longest[i] for i in order[at : at + 4]] for at in range(0, 24, 4)]
    assert all(batch == sorted(batch, reverse=True) for batch in batches)


def test_text_is_tokenised_with_the_tokenizer(tmp_path):
    """With the package's own sample and backbone. The tokenizer is saved with the heads."""
    path = embedded_backbone_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = dh.DualHeadForCausalLM.from_backbone(str(path), reward_head="full", gate="attention")
    rows = dh.data.load_preference_data("embedded")
    trainer = dh.DualHeadTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1, max_length=64),
        train_dataset=rows[:4],
        eval_dataset={"seen": rows[:2], "unseen": rows[2:4]},
        processing_class=tokenizer,
    )
    assert all(len(row["chosen_input_ids"]) <= 64 for row in trainer.train_dataset)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/accuracies"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    metrics = trainer.evaluate()
    assert {"eval_seen_rewards/margins", "eval_unseen_rewards/margins"} <= metrics.keys()
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    loaded = dh.DualHeadForCausalLM.from_pretrained(tmp_path)
    assert same(heads(model), {n: p for n, p in loaded.named_parameters() if n in heads(model)})
