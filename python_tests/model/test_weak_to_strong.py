# SPDX-License-Identifier: Apache-2.0
"""A weak model's heads guide a strong model, against a loop without caches."""

import pytest
import torch
from slow_decoding import slow_batch
from tiny_models import FAMILIES, VOCAB, make_backbone, make_model, prompts
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dualhead_ext as dh
from dualhead_ext import reference
from dualhead_ext.eval import likelihood

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
EVERY = pytest.mark.parametrize("family", FAMILIES)
CONTROLS = {
    "strength": torch.tensor([0.5, 1.5, 0.0]),
    "gate_offset": torch.tensor([0.3, -0.4, 0.1]),
    "objective_weights": torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]]),
}


def make_strong(seed=11):
    """A Llama with another width and depth, larger than the tiny models."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.lm_head.weight.mul_(3.0)  # its probabilities are about as peaked as the tiny models'
    return model


@torch.no_grad()
def slow_logits(strong, weak, ids, row=None):
    """The formula at the last position of one text (1, T): (1, V). row: an index into CONTROLS."""
    controls = {} if row is None else {name: value[row] for name, value in CONTROLS.items()}
    head, config = weak.lm_head_module, weak.dual_head_config
    hidden = weak.get_decoder()(input_ids=ids, use_cache=False)[0]
    gate = head.gate
    projections = (getattr(gate, f"{name}_weight") for name in "qkvo")
    logit = reference.attention_gate_logit(
        hidden, *projections, gate.out_weight, gate.out_bias, gate.num_heads
    )
    logit = logit + controls.get("gate_offset", 0.0)
    alpha = (torch.sigmoid(logit) * controls.get("strength", 1.0))[:, -1]
    alpha = alpha if weak.dual_head_config.mix == "logits" else alpha.clamp(max=1)
    shares = controls.get("objective_weights", torch.ones(config.num_objectives))
    shares = shares if row is not None else shares / config.num_objectives
    z_rm = torch.einsum("k,kvd,bd->bv", shares, head.reward_head.weight, hidden[:, -1])
    z_lm = strong(ids).logits[:, -1]
    if config.mix == "logits":
        return (1 - alpha) * z_lm + alpha * z_rm
    return ((1 - alpha) * z_lm.softmax(-1) + alpha * z_rm.softmax(-1)).log()


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_a_slow_loop(mix, use_cache):
    strong, weak, batch = make_strong(), make_model("qwen3", mix=mix), prompts()
    guided = dh.WeakToStrong(strong, weak)
    expected = slow_batch(batch, lambda ids: slow_logits(strong, weak, ids))
    got = guided.generate(**batch, **GREEDY, use_cache=use_cache)
    assert torch.equal(got[:, -NEW:], expected)
    for other in (strong, weak):
        assert not torch.equal(got, other.generate(**batch, **GREEDY))
    assert not torch.equal(make_backbone("qwen3").generate(**batch, **GREEDY), got)


def test_controls_are_per_row():
    strong, weak, batch = make_strong(), make_model("llama", num_objectives=2), prompts()
    got = dh.WeakToStrong(strong, weak).generate(**batch, **CONTROLS, **GREEDY)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        expected = slow_batch(one, lambda ids, row=row: slow_logits(strong, weak, ids, row))
        assert torch.equal(got[row : row + 1, -NEW:], expected)


@pytest.mark.quick_cases(8)
@EVERY
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_a_model_that_guides_itself_is_the_dual_head(family, mix):
    weak, batch = make_model(family, mix=mix), prompts()
    guided = dh.WeakToStrong(make_backbone(family), weak)
    assert torch.equal(guided.generate(**batch, **GREEDY), weak.generate(**batch, **GREEDY))


@EVERY
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_its_logits_are_the_dual_heads_too(family, mix):
    """Their values, not only their order: the backbone's own f is applied exactly once."""
    weak, ids = make_model(family, mix=mix), torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        expected = weak(ids, strength=0.8).logits
    got = dh.WeakToStrong(make_backbone(family), weak)(ids, strength=0.8).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.quick_cases(4)
@EVERY
def test_strength_zero_is_the_strong_models_own_text(family):
    strong, batch = make_backbone(family, seed=5), prompts()
    guided = dh.WeakToStrong(strong, make_model("llama"))
    expected = strong.generate(**batch, **GREEDY)
    assert torch.equal(guided.generate(**batch, **GREEDY, strength=0.0), expected)
    assert not torch.equal(guided.generate(**batch, **GREEDY), expected)
    # The strong model is unchanged
    assert torch.equal(strong.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2-softcap"])
def test_beams_equal_beams_without_a_cache(family):
    batch = prompts()
    guided = dh.WeakToStrong(make_strong(), make_model(family, num_objectives=2))
    beams = {"num_beams": 4, "num_return_sequences": 2} | GREEDY | CONTROLS
    cached = guided.generate(**batch, **beams)
    assert torch.equal(cached, guided.generate(**batch, **beams, use_cache=False))


def test_a_second_turn_on_the_same_cache():
    guided, batch = dh.WeakToStrong(make_strong(), make_model("llama")), prompts()
    first = guided.generate(**batch, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat((first.sequences, torch.full((3, 2), 9)), 1)
    grown = torch.ones(3, ids.shape[1] - batch["attention_mask"].shape[1], dtype=torch.long)
    turn = {"input_ids": ids, "attention_mask": torch.cat((batch["attention_mask"], grown), 1)}
    again = guided.generate(**turn, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(again, guided.generate(**turn, **GREEDY))
    filled = guided.strong(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"the 0 positions that the weak model has seen, got \d+"):
        guided.generate(**turn, **GREEDY, past_key_values=filled)


def test_processors_come_after_the_mixture():
    """A banned token stays banned, and a penalty applies to mixed logits."""
    strong, weak, batch = make_strong(), make_model("llama"), prompts()
    guided = dh.WeakToStrong(strong, weak)
    plain = guided.generate(**batch, **GREEDY)[:, -NEW:]
    banned = plain[0, 0].item()
    made = guided.generate(**batch, **GREEDY, bad_words_ids=[[banned]])[:, -NEW:]
    assert banned in plain and banned not in made
    out = guided.generate(
        **batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True)):
        expected = slow_logits(strong, weak, ids[mask.bool()][None])[0]
        torch.testing.assert_close(out.logits[0][row], expected, rtol=1e-4, atol=1e-4)


def test_a_full_pass_gives_likelihoods(seed):
    strong, weak = make_strong(), make_model("llama", num_objectives=2)
    guided = dh.WeakToStrong(strong, weak)
    ids = torch.randint(3, VOCAB, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    text = likelihood.Text(ids, [0, 0, 0, 1, 1, 1, 1, 1])
    for side in ("left", "right"):
        other = likelihood.Text(ids + ids, [0] * 15 + [1])
        found, _ = likelihood.token_log_probs(
            likelihood.of_model(guided), [text, other], padding_side=side
        )
        for n, value in enumerate(found):
            logits = slow_logits(strong, weak, torch.tensor([ids[: n + 3]]))
            expected = torch.log_softmax(logits.double(), -1)[0, ids[n + 3]]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    strong, weak, batch = make_strong(), make_model("llama"), prompts()
    with pytest.raises(TypeError, match="strong must be a plain model"):
        dh.WeakToStrong(weak, weak)
    with pytest.raises(TypeError, match="weak must have a gated head, got LlamaForCausalLM"):
        dh.WeakToStrong(strong, make_backbone("llama"))
    other = make_strong()
    other.lm_head = torch.nn.Linear(48, VOCAB + 1)
    with pytest.raises(ValueError, match=f"strong's vocabulary of {VOCAB + 1}, got {VOCAB}"):
        dh.WeakToStrong(other, weak)
    guided = dh.WeakToStrong(strong, weak)
    with pytest.raises(ValueError, match=r"WeakToStrong\.generate: strength must be a number >= 0"):
        guided.generate(**batch, **GREEDY, strength=-1.0)
    with pytest.raises(ValueError, match="input_ids must be given"):
        guided.generate(**GREEDY)
    with pytest.raises(NotImplementedError, match="static caches are not supported"):
        guided.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True)
    with pytest.raises(NotImplementedError, match="neither embeddings nor labels"):
        guided(batch["input_ids"], labels=batch["input_ids"])
    assert not strong._forward_hooks and not strong.lm_head._forward_hooks


def test_tokenizers_are_compared():
    strong, weak = make_strong(), make_model("llama")
    path = dh.data.embedded_backbone_path()
    one, two = (AutoTokenizer.from_pretrained(path) for _ in range(2))
    dh.WeakToStrong(strong, weak, one, two)
    two.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="got 1 others, such as '<new>'"):
        dh.WeakToStrong(strong, weak, one, two)
