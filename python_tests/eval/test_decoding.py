# SPDX-License-Identifier: Apache-2.0
"""The baseline decoders, each against a slow, obvious loop without caches."""

import pytest
import torch
import transformers
from slow_decoding import NEW, slow_batch
from tiny_models import VOCAB, make_backbone, make_model, prompts
from transformers import LlamaConfig, LlamaForSequenceClassification

from dualhead_ext.eval import decoding

GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def make_reward_model(seed=5, labels=1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=labels,
        pad_token_id=None,  # otherwise its own forward would treat token 0 as padding
    )
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.score.weight.normal_()
    return model


@torch.no_grad()
def log_probs(model, ids):
    return torch.log_softmax(model(ids).logits[:, -1].float(), -1)


@torch.no_grad()
def reward(model, ids):
    """The reward of one text, from the classifier's own forward."""
    return model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0]


@pytest.mark.parametrize(
    "family, strengths",
    [("llama", [1.5]), ("llama", [0.7, -0.4]), ("gemma2-softcap", [2.0]), ("gpt2", [1.0])],
)
def test_genarm_equals_a_slow_loop(family, strengths):
    base, batch = make_backbone(family), prompts()
    models = [make_backbone(family, seed=7 + k) for k in range(len(strengths))]

    def product(ids):
        parts = zip(models, strengths, strict=True)
        return log_probs(base, ids) + sum(a * log_probs(model, ids) for model, a in parts)

    got = decoding.genarm(base, batch, reward_models=models, strengths=strengths, **GREEDY)
    expected = slow_batch(batch, product)
    assert torch.equal(got[:, -NEW:], expected)
    assert not torch.equal(expected, base.generate(**batch, **GREEDY)[:, -NEW:])


@pytest.mark.parametrize("a", [0.2, 0.7])
def test_a_fixed_logits_mix_is_genarm_at_another_temperature(a):
    """softmax(((1-a) z_LM + a z_RM) / (T (1-a))) = pi_base^(1/T) pi_r^(a/((1-a) T)), normalised."""
    model, batch, temperature = make_model("llama", gate="fixed", gate_alpha=a), prompts(), 0.8
    base, arm = make_backbone("llama"), make_backbone("llama")
    arm.lm_head.weight.data = model.lm_head_module.reward_head.weight[0].detach().clone()
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    ours = model.generate(**batch, do_sample=False, **options)
    guide = decoding.AutoregressiveGuidance([arm], [a / (1 - a)], batch["attention_mask"])
    theirs = base.generate(
        **batch, do_sample=False, logits_processor=[guide], output_scores=True, **options
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for mixed, product in zip(ours.logits, theirs.scores, strict=True):
        p = torch.softmax(mixed.double() / (temperature * (1 - a)), -1)
        q = torch.softmax(product.double() / temperature, -1)
        assert (p - q).abs().max() < 1e-5


@pytest.mark.parametrize("weight, k", [(1.0, 10), (1.5, 3), (4.0, VOCAB + 5)])
def test_args_equals_a_slow_loop(weight, k):
    base, rm, batch = make_backbone("llama"), make_reward_model(), prompts()

    def scores(ids):
        with torch.no_grad():
            logits = base(ids).logits[0, -1].float()
        total = torch.full_like(logits, -torch.inf)
        for token in logits.topk(min(k, VOCAB)).indices:
            text = torch.cat((ids, token.view(1, 1)), 1)
            total[token] = logits[token] + weight * reward(rm, text)
        return total[None]

    got = decoding.args(base, batch, reward_model=rm, weight=weight, k=k, **GREEDY)
    expected = slow_batch(batch, scores)
    assert torch.equal(got[:, -NEW:], expected)
    assert not torch.equal(expected, base.generate(**batch, **GREEDY)[:, -NEW:])


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_args_beyond_a_sliding_window(kind):
    """Texts are longer than the window of the reward model. All or some of its layers have one."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        num_labels=1,
        pad_token_id=None,
    )
    judge = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        judge.score.weight.normal_()
    model, batch = make_backbone("llama"), prompts()

    def next_scores(ids):
        logits = model(ids).logits[:, -1].detach()
        top, tokens = logits.topk(5)
        total = torch.full_like(logits, -torch.inf)
        for value, token in zip(top[0], tokens[0], strict=True):
            text = torch.cat((ids, token.view(1, 1)), 1)
            total[0, token] = value + 2.0 * reward(judge, text)
        return total

    text = decoding.args(model, batch, reward_model=judge, weight=2.0, k=5, **GREEDY)
    assert torch.equal(text[:, -NEW:], slow_batch(batch, next_scores))


def test_neutral_settings_are_the_backbones_own_text():
    base, rm, batch = make_backbone("llama"), make_reward_model(), prompts()
    expected = base.generate(**batch, **GREEDY)
    arm = make_backbone("llama", seed=7)
    neutral = {
        "plain": {},
        "genarm": {"reward_models": [arm], "strengths": [0.0]},
        "args": {"reward_model": rm, "weight": 0.0},
        "best_of_n": {
            "reward": lambda ids, mask: ids.new_zeros(len(ids)),
            "n": 1,
            "pad_token_id": 0,
        },
    }
    assert neutral.keys() == decoding.DECODERS.keys()
    for name, options in neutral.items():
        assert torch.equal(decoding.DECODERS[name](base, batch, **options, **GREEDY), expected)


def test_guided_sampling_stays_within_the_candidates():
    base, rm, batch = make_backbone("llama"), make_reward_model(), prompts()
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 5.0, "top_k": 0}
    texts = decoding.args(base, batch, reward_model=rm, k=2, num_return_sequences=4, **options)
    assert texts.shape[0] == 12
    mask = batch["attention_mask"].repeat_interleave(4, 0)
    for row, kept in zip(texts, mask, strict=True):
        start = len(kept)
        for t in range(NEW):
            ids = torch.cat((row[:start][kept.bool()], row[start : start + t]))[None]
            with torch.no_grad():
                assert row[start + t] in base(ids).logits[0, -1].topk(2).indices


def test_best_of_n_is_the_best():
    base, rm, batch = make_backbone("llama"), make_reward_model(), prompts()
    seen = {}

    def score(ids, mask):
        seen.update(ids=ids, mask=mask, rewards=decoding.sequence_rewards(rm, ids, mask))
        return seen["rewards"]

    base.generation_config.eos_token_id = [3, 4, 5, 6, 7, 8]  # some rows end early
    best = decoding.best_of_n(
        base, batch, reward=score, n=8, pad_token_id=0, max_new_tokens=NEW, top_k=0
    )
    alone = [
        reward(rm, row[mask.bool()][None])
        for row, mask in zip(seen["ids"], seen["mask"], strict=True)
    ]
    torch.testing.assert_close(seen["rewards"], torch.stack(alone))
    assert seen["mask"][:, -NEW:].sum() < 24 * NEW
    for i, row in enumerate(best):
        assert torch.equal(row, seen["ids"][8 * i + int(torch.stack(alone)[8 * i :][:8].argmax())])


def test_a_row_that_ends_counts_its_end_token():
    new = torch.tensor([[1, 9, 2, 9, 0], [9, 0, 0, 0, 0], [1, 2, 3, 4, 5]])
    written = decoding._written(new, 9)
    assert written.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert decoding._written(new, None).all()


def test_what_cannot_be_guided_is_refused():
    base, rm, batch = make_backbone("llama"), make_reward_model(), prompts()
    arm = make_backbone("llama", seed=7)
    with pytest.raises(ValueError, match="beams"):
        decoding.genarm(
            base, batch, reward_models=[arm], strengths=[1.0], num_beams=3, max_new_tokens=NEW
        )
    with pytest.raises(ValueError, match="one number for each model, got 2 for 1"):
        decoding.genarm(base, batch, reward_models=[arm], strengths=[1.0, 2.0], **GREEDY)
    other = make_backbone("llama", seed=7)
    other.lm_head = torch.nn.Linear(other.config.hidden_size, VOCAB + 1, bias=False)
    with pytest.raises(ValueError, match=f"vocabulary {VOCAB}, got {VOCAB + 1}"):
        decoding.genarm(base, batch, reward_models=[other], strengths=[1.0], **GREEDY)
    with pytest.raises(ValueError, match="one label"):
        decoding.args(base, batch, reward_model=make_reward_model(labels=2), **GREEDY)
    with pytest.raises(ValueError, match="one label"):
        decoding.args(base, batch, reward_model=arm, **GREEDY)
    with pytest.raises(ValueError, match="k must be at least 1"):
        decoding.args(base, batch, reward_model=rm, k=0, **GREEDY)
    with pytest.raises(ValueError, match="n must be at least 1"):
        decoding.best_of_n(base, batch, reward=None, n=0, pad_token_id=0)
    with pytest.raises(ValueError, match="keep a token of each row"):
        decoding.sequence_rewards(rm, batch["input_ids"], torch.zeros_like(batch["input_ids"]))
    guide = decoding.TrajectoryGuidance(rm, 1.0, attention_mask=batch["attention_mask"][:, 1:])
    with pytest.raises(ValueError, match="attention_mask must be that of the prompts"):
        base.generate(**batch, **GREEDY, logits_processor=[guide])
