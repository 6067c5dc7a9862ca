# SPDX-License-Identifier: Apache-2.0
"""Backbones that call their lm_head in an unusual way are supported, or refused when heads are
attached.
"""

import pytest
import torch
import transformers
from tiny_models import FAMILIES, VOCAB, make_backbone, make_model, prompts
from transformers.cache_utils import DynamicCache

import dualhead_ext as dh
from dualhead_ext.model.hf_cache import cache_in

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_BERT = {"is_decoder": True, "is_encoder_decoder": False, "use_cache": True}
# {family: (model class, configuration class, changes)}
SERVED = {
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        {
            "dim_model_base": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    "falcon-mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", {"state_size": 4}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": 2, "intermediate_size_mlp": 40, "head_dim": 8},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    ),
}
REFUSED = {
    "bert": ("BertLMHeadModel", "BertConfig", _BERT, "changes the hidden states"),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", _BERT, "changes the hidden states"),
    "modernbert-decoder": (
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderConfig",
        {"global_attn_every_n_layers": 1},
        "",
    ),
    "openai-gpt": (
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "takes no cache",
    ),
}


def backbone_of(model_class, config_class, changes):
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**_SIZES | changes)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def steer(model):
    head = model.lm_head_module
    for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
        parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("family", SERVED)
def test_unusual_backbones_decode_correctly(family, mix):
    """At strength 0 the text is the backbone's.

    At strength 1, cached decoding equals full passes.
    """
    backbone = backbone_of(*SERVED[family])
    ids = torch.randint(3, VOCAB, (2, 7))
    plain = backbone.generate(ids, **GREEDY)
    logits = backbone(ids).logits
    model = dh.DualHeadForCausalLM.from_backbone(
        backbone, gate_num_heads=2, mix=mix, reward_head="full", gate="attention"
    )
    steer(model)
    assert torch.equal(model.generate(ids, **GREEDY, strength=0.0), plain)
    got = model(ids, strength=0.0).logits
    wanted = logits if mix == "logits" else torch.log_softmax(logits.float(), -1)
    torch.testing.assert_close(got, wanted.to(got), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits, got, atol=0.01)
    text = model.generate(ids, **GREEDY)
    full = model(text).logits
    assert torch.equal(full[:, 6:-1].argmax(-1), text[:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_usual_families_pass(family):
    head = make_model(family, trial=True).lm_head_module
    assert head.knows_f and not head.scaled_input


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    """The error names the reason, and the backbone is unchanged."""
    *parts, reason = REFUSED[family]
    backbone = backbone_of(*parts)
    ids = torch.randint(3, VOCAB, (2, 7))
    plain, kind = backbone(ids).logits, type(backbone)
    trained = [p.requires_grad for p in backbone.parameters()]
    match = f"from_backbone: {kind.__name__} cannot carry the gated head: .*{reason}"
    with pytest.raises(NotImplementedError, match=match):
        dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    assert type(backbone) is kind and torch.equal(backbone(ids).logits, plain)
    assert [p.requires_grad for p in backbone.parameters()] == trained


class Changed(transformers.LlamaForCausalLM):
    """A backbone that changes its logits although its config does not say so."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(VOCAB) * 0.05
        return out


class Unusual(transformers.LlamaForCausalLM):
    """A backbone that passes something else to its lm_head, but only in a cached step."""

    def forward(self, *args, **kwargs):
        cache = cache_in(kwargs)
        self.cached = cache is not None and cache.get_seq_length() > 0
        return super().forward(*args, **kwargs)


def test_logits_that_the_config_does_not_explain():
    backbone = make_backbone("llama")
    backbone.__class__ = Changed
    with pytest.raises(NotImplementedError, match='which mix="probs" must know'):
        dh.DualHeadForCausalLM.from_backbone(
            backbone, mix="probs", reward_head="full", gate="attention"
        )
    plain = backbone.generate(**prompts(), **GREEDY)
    model = dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    assert torch.equal(model.generate(**prompts(), **GREEDY, strength=0.0), plain)
    batch = prompts()
    with pytest.raises(NotImplementedError, match="its config does not say"):
        model(**batch, completion_mask=batch["attention_mask"])


def test_a_cached_step_that_differs():
    backbone = make_backbone("llama")
    backbone.__class__ = Unusual
    backbone.model.norm.register_forward_hook(
        lambda module, args, out: out * 1.5 if backbone.cached else None
    )
    with pytest.raises(NotImplementedError, match="a step with a cache gives other logits"):
        dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    dh.DualHeadForCausalLM.from_backbone(
        backbone, trial=False, reward_head="full", gate="attention"
    )


def test_a_trial_leaves_no_trace():
    backbone = make_backbone("llama").train()
    backbone.model.layers[0].eval()
    model = dh.DualHeadForCausalLM.from_backbone(backbone, reward_head="full", gate="attention")
    assert model.training and not model.model.layers[0].training
    head = model.lm_head_module
    assert head.last_alpha is None and not head._calls and head.knows_f
    assert not head._forward_pre_hooks
    cache = DynamicCache(config=model.config)
    assert torch.isfinite(model.eval()(**prompts(), past_key_values=cache).logits).all()
