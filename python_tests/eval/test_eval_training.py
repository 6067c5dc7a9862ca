# SPDX-License-Identifier: Apache-2.0
"""Training of the systems that are compared: each learns, loads, repeats itself, and computes the
loss that its paper says, on the tokens that the gated head trains on.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data.collate import PreferenceCollator, tokenize_pairs
from dualhead_ext.eval.decoding import sequence_rewards
from dualhead_ext.eval.paper import reinforcement, trained, training, training_run
from dualhead_ext.eval.paper.pretraining import make_model, write_backbone
from dualhead_ext.eval.paper.settings import DUAL_HEAD_VARIANTS, BackboneSpec, TrainSettings

datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("peft", reason="the extra peft is not installed")
from dualhead_ext.eval.paper import trl_trainers  # noqa: E402  TRL is there, so this must be, too

TINY = BackboneSpec(hidden_size=32, layers=2, heads=2, intermediate=48, context=32)
WORDS = "Tea Bread Rain Music Maths Gardens Trains Cats Snow Chess Ships Stars".split()
# Easily told apart: what is chosen and what is rejected share no word, and are equally long.
PAIRS = [
    {
        "prompt": f"\n\nHuman: {word}?\n\nAssistant:",
        "chosen": " good" * (2 + i % 3),
        "rejected": " bad" * (2 + i % 3),
    }
    for i, word in enumerate(WORDS)
]
FAST = {"batch_size": 4, "max_length": 48, "logging_steps": 1, "learning_rate": 1e-2}
ON_PAIRS = [name for name in training.TRAINERS if name != "rloo"]
ADAPTED = [(name, lora) for name in ON_PAIRS for lora in (False, True)]
ADAPTED.remove(("dual_head", True))  # its backbone is frozen in any case


def save_backbone(folder, seed=0):
    """A tiny Llama with the built-in tokenizer and weights that have something to say."""
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    torch.manual_seed(seed)
    model = make_model(TINY, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_backbone(model, tokenizer, {}, folder)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("eval") / "backbone")


@pytest.fixture(scope="module")
def tokenizer(backbone):
    return training_run.load_tokenizer(backbone)


def settings_of(steps, lora=False, learning_rate=1e-2):
    return TrainSettings(**FAST | {"learning_rate": learning_rate}, max_steps=steps, lora=lora)


def batch_of(pairs, tokenizer):
    collate = PreferenceCollator(tokenizer.pad_token_id)
    return collate(tokenize_pairs(pairs, tokenizer, FAST["max_length"]))


@torch.no_grad()
def response_logps(model, pairs, tokenizer):
    """(sum, length) of each text's response, one text at a time: the slow, obvious way. Chosen
    texts first.
    """
    sums, lengths = [], []
    for side in ("chosen", "rejected"):
        for row in tokenize_pairs(pairs, tokenizer, FAST["max_length"]):
            ids, mask = row[f"{side}_input_ids"], row[f"{side}_completion_mask"]
            logits = model(torch.tensor([ids])).logits[0]
            logps = torch.log_softmax(logits.to(model.dtype), -1)
            terms = [logps[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
            sums.append(sum(terms))
            lengths.append(len(terms))
    return torch.stack(sums), torch.tensor(lengths)


def ranked(name, model, backbone, tokenizer):
    """The share of the pairs that a system ranks as the people did, by its own measure."""
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
    if name != "reward_model":  # whose score starts anywhere
        assert ranked(name, trained.load_policy(backbone), backbone, tokenizer) < 0.5
    assert (record["trained_parameters"] < record["parameters"]) == (lora or name == "dual_head")
    kinds = {path.suffix for path in out.iterdir() if path.name != ".lock"}
    assert kinds <= {".json", ".safetensors"} and ".safetensors" in kinds
    assert not [path for path in tmp_path.iterdir() if path != out]
    if name != "reward_model":
        prompt = tokenizer(PAIRS[0]["prompt"], return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert written.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("name, lora", ADAPTED)
def test_a_seed_repeats_itself(tmp_path, backbone, name, lora):
    digests = []
    for i, seed in enumerate((1, 1, 2)):
        settings = TrainSettings(**FAST, max_steps=2, lora=lora, seed=seed)
        out = training.TRAINERS[name](backbone, PAIRS, tmp_path / str(i), settings)
        digests.append(trained.weights_digest(out))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("lora", [False, True])
def test_rloo_raises_the_reward(tmp_path, backbone, tokenizer, lora, monkeypatch):
    """A judge that likes half of the vocabulary, one that a direction of the embeddings tells from
    the other: the policy says it more and more; a seed repeats itself."""
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
    """BOS, prompt, response, EOS: the score of an encoded pair."""
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


# --- the losses -----------------------------------------------------------------------------------


def slow_loss(name, model, reference, tokenizer, beta, gamma):
    """The formula by hand, over all pairs."""
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
    """TRL's first loss over one batch of all pairs, against the formula in float64; as near as the
    formula itself comes in float32."""
    other = save_backbone(tmp_path / "reference", seed=1)  # or DPO's loss would be log 2
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
    """beta's defaults, GenARM's sums, SimPO's means and margin; no behaviour-cloning term."""
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
    """The record would say one thing and the run do another."""
    for train, option in (("dpo", {"learning_rate": 1.0}), ("simpo", {"cpo_alpha": 1.0})):
        with pytest.raises(TypeError, match=next(iter(option))):
            training.TRAINERS[train](
                backbone, PAIRS, tmp_path / train, TrainSettings(**FAST), **option
            )


# --- the tokens -----------------------------------------------------------------------------------


def real_pairs(tokenizer, max_length, count=6):
    """Pairs of HH-RLHF that nobody has to cut, and whose responses hold no further turn."""
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
    """Where nothing is cut and no response holds a further turn, TRL's own tokenisation agrees."""
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


# --- the gated head -------------------------------------------------------------------------------


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


def test_trl_is_imported_only_to_train_with_it():
    code = "import sys, dualhead_ext.eval.paper.training; print('trl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
