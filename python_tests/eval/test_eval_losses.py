# SPDX-License-Identifier: Apache-2.0
"""The compared systems have their papers' losses, on the tokens that the gated head trains on."""

import pytest
import torch
from paper_training import FAST, PAIRS, response_logps, save_backbone
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data.collate import PreferenceCollator, tokenize_pairs
from dualhead_ext.eval.paper import trained, training, training_run
from dualhead_ext.eval.paper.settings import TrainSettings

datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("peft", reason="the extra peft is not installed")
from dualhead_ext.eval.paper import trl_trainers  # noqa: E402  TRL is there, so this must be, too


def slow_loss(name, model, reference, tokenizer, beta, gamma):
    """The formula over all pairs, written out."""
    sums, lengths = response_logps(model, PAIRS, tokenizer)
    if name == "dpo":
        sums = sums - response_logps(reference, PAIRS, tokenizer)[0]
    if name == "simpo":
        sums = sums / lengths
    chosen, rejected = sums.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def slow_reward_loss(model, tokenizer):
    scores = []
    for side in ("chosen", "rejected"):
        for row in tokenize_pairs(PAIRS, tokenizer, FAST["max_length"]):
            hidden = model.model(torch.tensor([row[f"{side}_input_ids"]])).last_hidden_state
            scores.append(model.score(hidden[0, -1])[0])
    chosen, rejected = torch.stack(scores).chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


@pytest.mark.parametrize("name", ["autoregressive_reward", "simpo", "dpo", "reward_model"])
def test_the_loss_is_the_papers(tmp_path, backbone, tokenizer, name):
    """TRL's loss for one batch of all pairs, before training, against the formula in float64.

    The error allowed is that of the formula in float32.
    """
    # With equal models, DPO's loss would be log 2
    other = save_backbone(tmp_path / "reference", seed=1)
    settings = TrainSettings(**FAST | {"batch_size": len(PAIRS)})
    arguments = training_run.training_arguments(settings, tmp_path, progress=False)
    rows = tokenize_pairs(PAIRS, tokenizer, FAST["max_length"])
    beta, gamma = (0.7, 0.0) if name != "simpo" else (2.0, 0.6)
    reference = trained.load_policy(other)
    fresh = trained.fresh_reward_model if name == "reward_model" else trained.load_policy
    model = fresh(backbone)
    if name == "dpo":
        trainer = trl_trainers.dpo_trainer(
            model, reference, rows, tokenizer, arguments, None, beta=beta
        )
    elif name == "reward_model":
        trainer = trl_trainers.reward_trainer(model, rows, tokenizer, arguments, None)
    else:
        options = {"simpo": {"loss_type": "simpo", "simpo_gamma": gamma}}.get(name, {})
        trainer = trl_trainers.contrastive_trainer(
            model, rows, tokenizer, arguments, None, beta=beta, **options
        )
    batch = next(iter(trainer.get_train_dataloader()))
    got = trainer.compute_loss(trainer.model, batch).item()

    def by_hand(dtype):
        if name == "reward_model":
            return float(slow_reward_loss(model.to(dtype), tokenizer))
        plain = fresh(backbone, dtype=dtype)
        return float(slow_loss(name, plain, reference.to(dtype), tokenizer, beta, gamma))

    exact = by_hand(torch.float64)
    single = by_hand(torch.float32)
    tolerance = 8 * abs(single - exact) + 16 * torch.finfo(torch.float32).eps * abs(exact)
    assert abs(got - exact) <= tolerance
    assert abs(exact - 0.6931) > 1e-3


def test_the_recipes_options_reach_trl(tmp_path, backbone, monkeypatch):
    """beta's defaults, GenARM's sums, SimPO's means and margin, and no behaviour-cloning term."""
    seen = {}
    real = trl_trainers.contrastive_trainer

    def spy(*arguments, **options):
        trainer = real(*arguments, **options)
        seen[trainer.loss_type] = trainer
        return trainer

    monkeypatch.setattr(trl_trainers, "contrastive_trainer", spy)
    settings = TrainSettings(**FAST, max_steps=1)
    training.train_autoregressive_reward(backbone, PAIRS, tmp_path / "arm", settings)
    training.train_simpo(backbone, PAIRS, tmp_path / "simpo", settings, gamma=0.3)
    assert (seen["sigmoid"].beta, seen["sigmoid"].cpo_alpha) == (0.05, 0.0)
    simpo = seen["simpo"]
    assert (simpo.beta, simpo.cpo_alpha, simpo.simpo_gamma) == (2.0, 0.0, 0.3)


def test_an_option_that_repeats_a_setting_is_an_error(tmp_path, backbone):
    """Otherwise the record could state one value while the run uses another."""
    for train, option in (("dpo", {"learning_rate": 1.0}), ("simpo", {"cpo_alpha": 1.0})):
        with pytest.raises(TypeError, match=next(iter(option))):
            training.TRAINERS[train](
                backbone, PAIRS, tmp_path / train, TrainSettings(**FAST), **option
            )


# --- the tokens -----------------------------------------------------------------------------------


def real_pairs(tokenizer, max_length, count=6):
    """Pairs of HH-RLHF that need no truncation and whose responses have a single turn."""
    rows = dh.data.load_preference_data("embedded")
    plain = [r for r in rows if "\n\n" not in r["chosen"] + r["rejected"]]
    short = [
        r
        for r in plain
        if all(
            len(tokenizer(r["prompt"] + r[s])["input_ids"]) < max_length
            for s in ("chosen", "rejected")
        )
    ]
    assert len(short) >= count
    return short[:count]


def test_trl_trains_on_the_gated_heads_tokens(tmp_path, tokenizer):
    rows = tokenize_pairs(real_pairs(tokenizer, 200), tokenizer, 200)
    expected = PreferenceCollator(tokenizer.pad_token_id)(rows)
    ids, mask = expected["input_ids"], expected["completion_mask"]
    for row, seen in zip(ids, expected["attention_mask"], strict=True):
        tokens = row[seen.bool()].tolist()
        assert tokens.count(tokenizer.bos_token_id) == 1 == tokens.count(tokenizer.eos_token_id)
        assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
    masked = trl_trainers.MaskedCollator(tokenizer.pad_token_id)(rows)
    assert set(masked) == {"input_ids", "attention_mask", "completion_mask"}
    assert all(torch.equal(masked[name], expected[name]) for name in masked)
    text = trl_trainers.TextCollator(tokenizer.pad_token_id)(rows)
    assert set(text) == {"input_ids", "attention_mask"}
    assert all(torch.equal(text[name], expected[name]) for name in text)
    labels = trl_trainers.LabelCollator(tokenizer.pad_token_id)(rows)
    both = {
        name: torch.cat((labels[f"chosen_{name}"], labels[f"rejected_{name}"]))
        for name in ("input_ids", "attention_mask", "labels")
    }
    assert torch.equal(both["input_ids"], ids)
    assert torch.equal(both["attention_mask"], expected["attention_mask"])
    assert torch.equal(both["labels"], torch.where(mask.bool(), ids, -100))


def test_our_tokens_are_trls_own(tmp_path, backbone, tokenizer):
    """TRL's tokenisation agrees, for pairs without truncation and responses of a single turn."""
    pairs = real_pairs(tokenizer, 200)
    data = datasets.Dataset.from_list(pairs)
    rows = tokenize_pairs(pairs, tokenizer, 200)
    settings = TrainSettings(max_length=200)
    arguments = training_run.training_arguments(settings, tmp_path, progress=False)
    shared = {"train_dataset": data, "processing_class": tokenizer}
    cpo = trl_trainers.CPOTrainer(
        model=trained.load_policy(backbone),
        args=trl_trainers.CPOConfig(**arguments),
        **shared,
    )
    dpo = trl_trainers.DPOTrainer(
        model=trained.load_policy(backbone),
        ref_model=trained.load_policy(backbone),
        args=trl_trainers.DPOConfig(**arguments),
        **shared,
    )
    reward = trl_trainers.RewardTrainer(
        model=trained.fresh_reward_model(backbone),
        args=trl_trainers.RewardConfig(**arguments),
        **shared,
    )
    for i, ours in enumerate(rows):
        for side in ("chosen", "rejected"):
            ids, mask = ours[f"{side}_input_ids"], ours[f"{side}_completion_mask"]
            theirs = cpo.train_dataset[i]
            assert theirs[f"{side}_input_ids"] == ids
            responses = [t if m else -100 for t, m in zip(ids, mask, strict=True)]
            assert theirs[f"{side}_labels"] == responses
            theirs = dpo.train_dataset[i]
            assert theirs["prompt_ids"] + theirs[f"{side}_ids"] == ids
            assert len(theirs["prompt_ids"]) == mask.index(1)
            assert reward.train_dataset[i][f"{side}_ids"] == ids


def test_a_padding_token_that_ends_no_text(tmp_path, backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "shared")
    assert training_run.load_tokenizer(tmp_path / "shared").pad_token == tokenizer.bos_token
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="padding token other than its end token"):
        training_run.load_tokenizer(tmp_path / "same")
