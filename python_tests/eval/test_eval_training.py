# SPDX-License-Identifier: Apache-2.0
"""Training of the compared systems: each learns, can be loaded, and is reproducible."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from paper_training import FAST, PAIRS, TINY, batch_of, response_logps, save_backbone

from dualhead_ext.data.collate import tokenize_pairs
from dualhead_ext.eval.decoding import sequence_rewards
from dualhead_ext.eval.paper import reinforcement, trained, training
from dualhead_ext.eval.paper.pretraining import make_model, write_backbone
from dualhead_ext.eval.paper.settings import DUAL_HEAD_VARIANTS, TrainSettings

pytest.importorskip("datasets", reason="the extra data is not installed")
pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("peft", reason="the extra peft is not installed")

ON_PAIRS = [name for name in training.TRAINERS if name != "rloo"]
ADAPTED = [(name, lora) for name in ON_PAIRS for lora in (False, True)]
ADAPTED.remove(("dual_head", True))  # its backbone is always frozen


def settings_of(steps, lora=False, learning_rate=1e-2):
    return TrainSettings(**FAST | {"learning_rate": learning_rate}, max_steps=steps, lora=lora)


def ranked(name, model, backbone, tokenizer):
    """The share of pairs that a system ranks as people did, by the system's own measure."""
    if name == "reward_model":
        batch = batch_of(PAIRS, tokenizer)
        scores = sequence_rewards(model, batch["input_ids"], batch["attention_mask"])
    else:
        scores, lengths = response_logps(model, PAIRS, tokenizer)
        if name == "dpo":
            scores = scores - response_logps(trained.load_policy(backbone), PAIRS, tokenizer)[0]
        scores = scores / lengths if name == "simpo" else scores
    chosen, rejected = scores.chunk(2)
    return float((chosen > rejected).float().mean())


def load(name, folder, backbone):
    one = trained.load_reward_model if name == "reward_model" else trained.load_policy
    return one(folder, backbone)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("name, lora", ADAPTED)
def test_learns_and_loads(tmp_path, backbone, tokenizer, name, lora):
    rates = {"learning_rate": 3e-2 if lora else 1e-2}
    settings = TrainSettings(**FAST | rates, epochs=6, lora=lora, beta=1.0)
    out = training.TRAINERS[name](backbone, PAIRS, tmp_path / "out", settings)
    record = trained.read_record(out)
    losses = [entry["loss"] for entry in record["logs"] if "loss" in entry]
    assert len(losses) == record["steps"] == 18
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    model = load(name, out, backbone)
    assert ranked(name, model, backbone, tokenizer) == 1.0
    if name != "reward_model":  # an untrained reward model's scores are arbitrary
        assert ranked(name, trained.load_policy(backbone), backbone, tokenizer) < 0.5
    assert (record["trained_parameters"] < record["parameters"]) == (lora or name == "dual_head")
    kinds = {path.suffix for path in out.iterdir() if path.name != ".lock"}
    assert kinds <= {".json", ".safetensors"} and ".safetensors" in kinds
    assert not [path for path in tmp_path.iterdir() if path != out]
    if name != "reward_model":
        prompt = tokenizer(PAIRS[0]["prompt"], return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert written.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name, lora", ADAPTED)
def test_a_seed_repeats_itself(tmp_path, backbone, name, lora):
    digests = []
    for i, seed in enumerate((1, 1, 2)):
        settings = TrainSettings(**FAST, max_steps=2, lora=lora, seed=seed)
        out = training.TRAINERS[name](backbone, PAIRS, tmp_path / str(i), settings)
        digests.append(trained.weights_digest(out))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_rloo_raises_the_reward(tmp_path, backbone, tokenizer, lora, monkeypatch):
    """The reward is the share of tokens from a preferred half of the vocabulary.

    The sign of one component of their embeddings defines that half. The policy must write more and
    more of these tokens. Two runs with one seed give the same weights.
    """
    liked = trained.load_policy(backbone).get_input_embeddings().weight[:, 0] > 0
    judged = []

    def share(judge, tokenizer, *, completion_ids, **others):
        judged.append(completion_ids)
        return [float(liked[ids].float().mean()) for ids in completion_ids]

    judge = training.train_reward_model(backbone, PAIRS, tmp_path / "judge", settings_of(steps=1))
    monkeypatch.setattr(reinforcement, "text_rewards", share)
    options = {"reward_model": judge, "new_tokens": 4, "generations": 12}
    out, again = (
        training.train_rloo(backbone, PAIRS, tmp_path / name, settings_of(8, lora, 3e-2), **options)
        for name in ("a", "b")
    )
    assert trained.weights_digest(out) == trained.weights_digest(again)
    logs = [entry["reward"] for entry in trained.read_record(out)["logs"] if "reward" in entry]
    assert len(logs) == 8 and sum(logs[-2:]) / 2 > logs[0] + 0.1
    assert all(len(ids) <= 4 for batch in judged for ids in batch)
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}
    prompt = tokenizer(PAIRS[0]["prompt"], return_tensors="pt")
    policy = trained.load_policy(out, backbone)
    assert policy.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    with pytest.raises(ValueError, match="prompts of at most 1 tokens, got 0"):
        settings = TrainSettings(**FAST | {"max_length": 5})
        training.train_rloo(backbone, PAIRS, tmp_path / "c", settings, **options)


def test_rloo_scores_the_texts_as_the_judge_was_trained_to(backbone, tokenizer):
    """Both score the same tokens: BOS, prompt, response, EOS."""
    judge = trained.fresh_reward_model(backbone).eval()
    rows = tokenize_pairs(PAIRS, tokenizer, FAST["max_length"])
    ids, mask = (
        [row[f"chosen_{kind}"] for row in rows] for kind in ("input_ids", "completion_mask")
    )
    written = [row[flags.index(1) :] for row, flags in zip(ids, mask, strict=True)]
    prompts = [row["prompt"] for row in PAIRS]
    got = reinforcement.text_rewards(judge, tokenizer, prompts=prompts, completion_ids=written)
    batch = batch_of(PAIRS, tokenizer)
    expected = sequence_rewards(judge, batch["input_ids"], batch["attention_mask"])[: len(PAIRS)]
    assert torch.allclose(torch.tensor(got), expected, rtol=1e-5, atol=1e-6)


# --- the gated head -------------------------------------------------------------------------------


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("variant", DUAL_HEAD_VARIANTS)
def test_every_variant_trains(tmp_path, backbone, variant):
    options = DUAL_HEAD_VARIANTS[variant]
    settings = TrainSettings(**FAST, max_steps=1)
    out = training.train_dual_head(backbone, PAIRS, tmp_path / "out", settings, **options)
    config = trained.load_policy(out, backbone).dual_head_config
    of_head = {name: value for name, value in options.items() if hasattr(config, name)}
    assert {name: getattr(config, name) for name in of_head} == of_head
    assert trained.read_record(out)["options"] == options


def test_two_objectives(tmp_path, backbone):
    pairs = [row | {"objective": i % 2} for i, row in enumerate(PAIRS)]
    settings = TrainSettings(**FAST, max_steps=2)
    out = training.train_dual_head(backbone, pairs, tmp_path / "out", settings, num_objectives=2)
    head = trained.load_policy(out, backbone).lm_head_module.reward_head.weight
    assert head.shape[0] == 2 and not torch.equal(head[0], head[1])


@pytest.mark.parametrize("name", ["dual_head", "dpo", "reward_model"])
def test_another_architecture_and_its_size(tmp_path, tokenizer, name):
    """A Mistral with the tokenizer of the Llama."""
    spec = dataclasses.replace(TINY, architecture="mistral", hidden_size=16)
    write_backbone(make_model(spec, tokenizer), tokenizer, {}, tmp_path / "mistral")
    settings = TrainSettings(**FAST, max_steps=1, lora=name == "dpo")
    out = training.TRAINERS[name](tmp_path / "mistral", PAIRS, tmp_path / "out", settings)
    assert load(name, out, tmp_path / "mistral").config.model_type == "mistral"


def test_progress_is_silent_unless_asked_for(tmp_path, backbone, capfd):
    settings = TrainSettings(**FAST, max_steps=2)
    for shown in (False, True):
        capfd.readouterr()
        training.train_dpo(backbone, PAIRS, tmp_path / str(shown), settings, progress=shown)
        out, err = capfd.readouterr()
        assert out == "" and ("loss=" in err) == ("2/2" in err) == shown
        assert shown or "it/s" not in err


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", ON_PAIRS)
def test_nan_is_loud_and_leaves_nothing(tmp_path, backbone, tokenizer, name):
    model = trained.load_policy(backbone)
    with torch.no_grad():
        model.base_model.norm.weight[3] = torch.nan
    write_backbone(model, tokenizer, {}, tmp_path / "broken")
    settings = TrainSettings(**FAST, max_steps=2)
    with pytest.raises(FloatingPointError, match="is nan at step 1"):
        training.TRAINERS[name](tmp_path / "broken", PAIRS, tmp_path / "out", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_nothing_is_overwritten(tmp_path, backbone):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        training.train_dual_head(backbone, PAIRS, tmp_path, TrainSettings(max_steps=1))
    with pytest.raises(ValueError, match="pairs must hold at least one"):
        training.train_dpo(backbone, [], tmp_path / "out", TrainSettings(max_steps=1))
    with pytest.raises(TypeError, match="no_such_option"):
        training.train_dual_head(
            backbone, PAIRS, tmp_path / "out", TrainSettings(max_steps=1), no_such_option=1
        )


@pytest.mark.parametrize("name", ["dpo", "reward_model"])
def test_an_adapter_wants_its_own_backbone(tmp_path, backbone, name):
    settings = TrainSettings(**FAST, max_steps=1, lora=True)
    out = training.TRAINERS[name](backbone, PAIRS, tmp_path / "out", settings)
    assert json.loads((out / trained.ADAPTER_NAME).read_text())["base_model_name_or_path"] == ""
    assert str(backbone) not in "".join(
        path.read_text() for path in out.iterdir() if path.suffix == ".json"
    )
    with pytest.raises(ValueError, match="pass backbone="):
        load(name, out, None)
    with pytest.raises(ValueError, match="trained on another backbone"):
        load(name, out, save_backbone(tmp_path / "other", seed=3))


def test_merging_an_adapter_changes_rounding_alone(tmp_path, backbone, tokenizer):
    settings = TrainSettings(**FAST, max_steps=3, lora=True)
    out = training.train_dpo(backbone, PAIRS, tmp_path / "out", settings)
    ids = batch_of(PAIRS, tokenizer)["input_ids"]
    with torch.no_grad():
        exact = trained.load_policy(out, backbone, torch.float64, merge=False)(ids).logits
        attached = trained.load_policy(out, backbone, merge=False)(ids).logits
        merged = trained.load_policy(out, backbone)(ids).logits
        plain = trained.load_policy(backbone)(ids).logits
    error = float((attached - exact).abs().max())
    assert float((merged - exact).abs().max()) <= 8 * error < float((plain - exact).abs().max())


def test_a_policy_is_no_reward_model(backbone):
    with pytest.raises(ValueError, match="holds no trained score"):
        trained.load_reward_model(backbone)


@pytest.mark.slow
def test_trl_is_imported_only_to_train_with_it():
    code = "import sys, dualhead_ext.eval.paper.training; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
