# SPDX-License-Identifier: Apache-2.0
"""Whole models whose reward head is a correction.

The tests cover generate(), its loops and caches, files, weak-to-strong guidance, and a larger
vocabulary.
"""

import pytest
import torch
from test_weak_to_strong import make_strong
from tiny_models import VOCAB, make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext import reference

KINDS = [("embedding", 0), ("embedding", 2), ("lowrank", 2)]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
CONTROLS = {
    "strength": torch.tensor([0.0, 0.6, 1.7]),
    "gate_offset": 0.3,
    "objective_weights": torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.6, -0.3]]),
}


def model_of(kind, family="llama-tied", **config):
    names = {"reward_head": kind[0], "reward_rank": kind[1], "num_objectives": 2}
    return make_model(family, **names | config)


def slow_greedy(model, row):
    """Greedy text of one row, from full passes of the head without a cache."""
    batch = prompts()
    real = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][real][None]
    controls = {n: v if isinstance(v, float) else v[row, None] for n, v in CONTROLS.items()}
    for _ in range(NEW):
        logits = model(input_ids=ids, use_cache=False, **controls).logits
        ids = torch.cat((ids, logits[:, -1].argmax(-1)[:, None]), 1)
    return ids[0, -NEW:]


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("family", ["llama-tied", "gemma2-softcap", "phi-bias"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_generate_is_the_slow_loop(kind, family, mix):
    model, batch = model_of(kind, family, mix=mix), prompts()
    expected = torch.stack([slow_greedy(model, row) for row in range(3)])
    for options in ({"fused": True}, {"fused": False}, {"max_kl": 1e9}):
        got = model.generate(**batch, **GREEDY, **CONTROLS, **options)[:, -NEW:]
        assert torch.equal(got, expected), options
    alone = make_backbone(family).generate(**batch, **GREEDY)[0, -NEW:]
    assert torch.equal(expected[0], alone)  # strength 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_static_cache_beams_and_alpha(kind):
    model, batch = model_of(kind), prompts()
    plain = model.generate(**batch, **GREEDY, **CONTROLS)
    static = model.generate(
        **batch, **GREEDY, **CONTROLS, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, plain)
    beams = model.generate(**batch, **GREEDY, **CONTROLS, num_beams=3)
    own = make_backbone("llama-tied").generate(**batch, **GREEDY, num_beams=3)
    assert torch.equal(beams[0], own[0])  # strength 0
    out = model.generate(
        **batch, **GREEDY, **CONTROLS, output_gate=True, return_dict_in_generate=True
    )
    assert out.gate_alpha.shape == (3, NEW) and not out.gate_alpha[0].any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_files_and_detach(kind, tmp_path):
    model, batch = model_of(kind), prompts()
    expected = model.generate(**batch, **GREEDY, **CONTROLS)
    model.save_pretrained(tmp_path)
    again = dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=make_backbone("llama-tied"))
    assert again.dual_head_config == model.dual_head_config
    assert torch.equal(again.generate(**batch, **GREEDY, **CONTROLS), expected)
    plain = make_backbone("llama-tied").generate(**batch, **GREEDY)
    assert torch.equal(dh.detach(again).generate(**batch, **GREEDY), plain)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_weak_to_strong_corrects_the_strong_model(kind, mix):
    strong, weak, batch = make_strong(), model_of(kind, mix=mix), prompts()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shares, strength = CONTROLS["objective_weights"], CONTROLS["strength"]
    guided = dh.WeakToStrong(strong, weak)
    controls = {"strength": strength, "objective_weights": shares}
    got = guided(ids, attention_mask=mask, **controls).logits[:, -1].double()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    z_lm = strong(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    head = weak.lm_head_module
    hidden = weak.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions)[0]
    alpha = torch.sigmoid(head.gate(hidden, mask)[:, -1]) * strength
    last, delta = hidden[:, -1].double(), 0.0
    for k in range(2):
        change = head.reward_head.bias[k].double()
        if kind[1]:
            low = last @ head.reward_head.down.weight[k].double().T
            change = change + low @ head.reward_head.up.weight[k].double().T
        change = change if kind[0] == "lowrank" else change @ head.weight.double().T
        delta = delta + shares[:, k, None].double() * change
    z_lm, alpha = z_lm.double(), alpha.double()
    if mix == "logits":
        expected = z_lm + alpha[:, None] * delta
    else:
        expected = reference.mix_logits(z_lm, z_lm + delta, alpha.clamp(max=1), "probs")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    text = guided.generate(**batch, **GREEDY, strength=0.0)
    assert torch.equal(text, strong.generate(**batch, **GREEDY))


@pytest.mark.parametrize("kind", [("full", 1), *KINDS], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "phi-bias", "gemma2-softcap"])
def test_a_plain_model_decodes_as_the_gated_one_with_the_merged_head(kind, family):
    """The gate is fixed. A tied embedding stays as it is."""
    model, batch = model_of(kind, family, gate="fixed", gate_alpha=0.3), prompts()
    shares = [0.2, 0.8]
    controls = {"strength": 1.7, "objective_weights": shares}
    expected, logits = (
        model.generate(**batch, **GREEDY, **controls),
        model(**batch, **controls).logits,
    )
    plain = make_backbone(family)
    embedding = plain.get_input_embeddings().weight.detach().clone()
    assert (plain(**batch).logits - logits).abs().max() > 0.01
    merged = model.lm_head_module.merge_fixed(objective_weights=shares, strength=1.7)
    plain.config.tie_word_embeddings = False
    plain.set_output_embeddings(merged)
    torch.testing.assert_close(plain(**batch).logits, logits.to(merged.weight.dtype))
    assert torch.equal(plain.generate(**batch, **GREEDY), expected)
    assert torch.equal(plain.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("kind", [("full", 1), *KINDS], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "phi-bias"])
def test_the_heads_follow_a_larger_vocabulary(kind, family):
    model, ids = model_of(kind, family), prompts()["input_ids"]
    model.lm_head_module.reward_head.requires_grad_(True)
    before = model(input_ids=ids, strength=1.7).logits.detach()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    assert model.dual_head_config.vocab_size == VOCAB + 7
    model.post_init()  # initialises the weights that transformers does not know to be initialised
    after = model(input_ids=ids, strength=1.7).logits
    torch.testing.assert_close(after[..., :VOCAB], before)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
    head, hidden = model.lm_head_module, torch.randn(5, 32)
    rewards = head.reward_head.token_rewards(
        hidden, torch.full((5,), VOCAB + 2), head.lm_weight, head.lm_bias
    )
    assert (kind[0] == "embedding") == bool(rewards.abs().max() > 1e-6)
    assert model.generate(ids, **GREEDY).shape == (3, ids.shape[1] + NEW)
    model.quantize("int8")
    with pytest.raises(RuntimeError, match="resize_token_embeddings: the heads are quantised"):
        model.resize_token_embeddings(VOCAB + 9)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_heads_in_another_form_take_their_place(kind, tmp_path):
    model, batch = model_of(kind), prompts()
    weights = [0.3, 0.7]
    expected = model.generate(**batch, **GREEDY, strength=1.5, objective_weights=weights)
    model.use_heads(model.lm_head_module.merge_objectives(weights))
    assert model.dual_head_config.num_objectives == 1
    assert torch.equal(model.generate(**batch, **GREEDY, strength=1.5), expected)
    model.save_pretrained(tmp_path)
    again = dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=make_backbone("llama-tied"))
    assert torch.equal(again.generate(**batch, **GREEDY, strength=1.5), expected)


def test_a_full_head_and_its_whole_correction_say_the_same():
    model, batch = make_model("phi-bias", reward_head="full"), prompts()
    expected = model.generate(**batch, **GREEDY, strength=1.5)
    small, error = model.lm_head_module.compress("lowrank", model.dual_head_config.hidden_size)
    assert float(error) < 1e-3
    model.use_heads(small)
    assert torch.equal(model.generate(**batch, **GREEDY, strength=1.5), expected)
    model.use_heads(model.lm_head_module.expand())
    assert model.dual_head_config.reward_head == "full"
    assert torch.equal(model.generate(**batch, **GREEDY, strength=1.5), expected)


def test_heads_that_do_not_fit_are_refused():
    model = model_of(("lowrank", 2))
    before = model.dual_head_config
    with pytest.raises(ValueError, match=r"use_heads: head\.config\.bias must be False, got True"):
        model.use_heads(model.lm_head_module.expand())
    other = dh.DualHead(dh.DualHeadConfig(hidden_size=8, vocab_size=VOCAB))
    with pytest.raises(ValueError, match=r"use_heads: head\.config\.hidden_size must be"):
        model.use_heads(other)
    with pytest.raises(TypeError, match="use_heads: head must be a DualHead, got Linear"):
        model.use_heads(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="use_heads"):
        model_of(("lowrank", 2)).quantize("int8").use_heads(model.lm_head_module)
    assert model.dual_head_config is before
