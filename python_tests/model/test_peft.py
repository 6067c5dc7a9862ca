# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters on a gated model change the backbone and leave the heads unchanged."""

import pytest
import torch
from tiny_models import make_backbone, make_model, prompts

import dualhead_ext as dh

peft = pytest.importorskip("peft", reason="the extra peft is not installed")

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def adapted(model, **options):
    """The model with a LoRA adapter that has an effect."""
    options = {"r": 2, "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped.eval()


@pytest.mark.parametrize(
    "targets",
    [None, "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "out", "lm_head.gate.q_proj"]],
    ids=["default", "all-linear", "by-name"],
)
@pytest.mark.parametrize("gate", ["attention", "linear"])
def test_targets_leave_the_heads_alone(targets, gate, tmp_path):
    model, batch = make_model("llama", gate=gate), prompts()
    names = set(model.lm_head.state_dict())
    wrapped = adapted(model, target_modules=targets)
    adapters = [n for n, _ in wrapped.named_parameters() if "lora_" in n]
    assert adapters and not any("lm_head" in name for name in adapters)
    assert set(model.lm_head.state_dict()) == names
    # On the adapted model, decoding agrees with a full pass.
    ids = wrapped.generate(**batch, **GREEDY)
    mask = torch.cat((batch["attention_mask"], batch["attention_mask"].new_ones(3, 6)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = wrapped(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(full[:, 6:-1].argmax(-1), ids[:, 7:])
    wrapped.get_base_model().save_pretrained(tmp_path)
    restored = dh.DualHeadForCausalLM.from_pretrained(tmp_path, backbone=make_backbone("llama"))
    for name, value in model.lm_head.state_dict().items():
        assert torch.equal(restored.lm_head.state_dict()[name], value)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        # PEFT adapts the LM head with the embedding that it is tied to.
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=lambda options: "-".join([next(iter(options)), *list(options)[1:]]),
)
def test_an_adapter_in_the_heads_place_is_named(options, tmp_path):
    model, batch = make_model("llama-tied"), prompts()
    match = "peft .* has replaced the gated lm_head"
    with pytest.raises(NotImplementedError, match=match):
        adapted(model, **options)(**batch)
    with pytest.raises(NotImplementedError, match=match):
        model.generate(**batch, **GREEDY)
    with pytest.raises(NotImplementedError, match=match):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_trainable_tokens_of_an_untied_embedding():
    model, batch = make_model("llama"), prompts()
    wrapped = adapted(model, trainable_token_indices=[3, 5])
    wrapped(**batch, labels=batch["input_ids"]).loss.backward()
    graded = [n for n, p in wrapped.named_parameters() if p.grad is not None]
    assert any("trainable_tokens" in name for name in graded)


@pytest.mark.parametrize("name", ["lm_head.reward_head.weight", "lm_head.gate.q_weight"])
def test_an_adapter_of_one_of_the_heads_parameters_is_named(name, tmp_path):
    model, batch = make_model("llama"), prompts()
    wrapped = adapted(model, target_modules=[], target_parameters=[name])
    match = "peft ParamWrapper has replaced lm_head."
    with pytest.raises(NotImplementedError, match=match):
        wrapped(**batch)
    with pytest.raises(NotImplementedError, match=match):
        wrapped.generate(**batch, **GREEDY)
    with pytest.raises(NotImplementedError, match=match):
        model.save_pretrained(tmp_path)


def prompt_tuned(model):
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("fused", [False, None])
def test_prompt_tuning_with_a_padded_mask(fused):
    """The gate sees the virtual tokens, then the prompt without its padding."""
    batch = prompts()
    wrapped = prompt_tuned(make_model("llama"))
    plain = prompt_tuned(make_backbone("llama")).generate(**batch, **GREEDY)
    assert torch.equal(wrapped.generate(**batch, **GREEDY, fused=fused, strength=0.0), plain)
    ids = wrapped.generate(**batch, **GREEDY, fused=fused)
    mask = torch.cat((batch["attention_mask"], batch["attention_mask"].new_ones(3, 6)), 1)
    inner, virtual = wrapped.get_base_model(), wrapped.get_prompt(3)
    embeds = torch.cat((virtual, inner.get_input_embeddings()(ids)), 1)
    mask = torch.cat((mask.new_ones(3, 3), mask), 1)
    full = inner(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(full.logits[:, 9:-1].argmax(-1), ids[:, 7:])
    other = inner(inputs_embeds=embeds)
    assert not torch.equal(full.logits[:, 9:-1].argmax(-1), other.logits[:, 9:-1].argmax(-1))


def test_prefix_tuning_is_named():
    model, batch = make_model("llama"), prompts()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(model, config).eval()
    with pytest.raises(ValueError, match="the cache holds 3 positions that the gate has not"):
        wrapped.generate(**batch, **GREEDY)


def test_heads_on_an_adapted_backbone():
    """from_backbone extends the model inside PEFT's wrapper, and the wrapper can still be used."""
    wrapped, batch = adapted(make_backbone("llama"), target_modules="all-linear"), prompts()
    plain = wrapped.generate(**batch, **GREEDY)
    model = dh.DualHeadForCausalLM.from_backbone(wrapped, reward_head="full", gate="attention")
    assert model is wrapped.get_base_model()
    assert torch.equal(model.generate(**batch, **GREEDY, strength=0.0), plain)
    assert torch.equal(wrapped.generate(**batch, **GREEDY, strength=0.0), plain)
    with wrapped.disable_adapter():
        assert not torch.equal(wrapped.generate(**batch, **GREEDY, strength=0.0), plain)


def test_an_embedding_adapter_merges_as_into_the_plain_backbone():
    """PEFT warns that a tied lm_head changes with the embedding. A gated model must do the same."""
    merged = []
    for model in (make_backbone("llama-tied"), make_model("llama-tied")):
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            merged.append(adapted(model, target_modules=["embed_tokens"]).merge_and_unload())
    plain, gated = merged
    assert gated.lm_head.weight is gated.get_input_embeddings().weight
    assert torch.equal(gated.lm_head.weight, plain.lm_head.weight)
    batch = prompts()
    expected = plain.generate(**batch, **GREEDY)
    assert torch.equal(gated.generate(**batch, **GREEDY, strength=0.0), expected)


def test_heads_on_a_backbone_with_an_adapted_lm_head_are_refused():
    wrapped = adapted(make_backbone("llama"), target_modules=["lm_head"])
    with pytest.raises(TypeError, match="LlamaForCausalLM must have a linear lm_head, got peft"):
        dh.DualHeadForCausalLM.from_backbone(wrapped, reward_head="full", gate="attention")
    model = dh.DualHeadForCausalLM.from_backbone(
        wrapped.merge_and_unload(), reward_head="full", gate="attention"
    )
    assert torch.isfinite(model(**prompts()).logits).all()
