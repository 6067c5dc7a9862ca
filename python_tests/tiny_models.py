# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of twelve families, with the property that each one is here to test."""

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dualhead_ext as dh

VOCAB = 101
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "gemma2-softcap": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"final_logit_softcapping": 3.0, "sliding_window": 4},
    ),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 4}),
    "granite-scale": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 2.5}),
    "cohere-scale": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    "phi-bias": (PhiForCausalLM, PhiConfig, {"num_key_value_heads": 4}),
    "lfm2-hybrid": (
        Lfm2ForCausalLM,
        Lfm2Config,
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
}
# {backbone that post-processes its logits: (logit_scale, logit_softcap)}
POST_PROCESSING = {
    "gemma2-softcap": (1.0, 3.0),
    "granite-scale": (0.4, 0.0),
    "cohere-scale": (0.25, 0.0),
}


def make_backbone(family: str, seed: int = 0, **sizes):
    """The family's tiny model with random weights, larger than fresh ones, so that its text varies.

    sizes: fields of its configuration.
    """
    model_class, config_class, changes = FAMILIES[family]
    shape = _COMMON if family == "gpt2" else _SHAPE
    torch.manual_seed(seed)
    model = model_class(config_class(**shape | changes | sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # No row of random text may end early.
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def make_model(family: str, seed: int = 0, sizes: dict | None = None, **config):
    """The family's tiny model with a gated head whose gate and reward head have an effect."""
    model = dh.DualHeadForCausalLM.from_backbone(
        make_backbone(family, seed, **sizes or {}),
        **{"reward_head": "full", "gate": "attention"}
        | {"gate_num_heads": 2, "gate_head_dim": 6, "trial": False}
        | config,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    head = model.lm_head_module
    with torch.no_grad():
        for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if hasattr(head.gate, "out_weight"):
            head.gate.out_weight.mul_(0.2)  # keeps alpha away from 0 and 1
    return model.eval()


def prompts(seed: int = 3):
    """Three prompts of 7, 4 and 6 tokens, left-padded: input_ids, attention_mask."""
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 1)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def first_row(batch: dict) -> dict:
    """A batch's first row, as a batch."""
    return {name: value[:1] for name, value in batch.items()}
