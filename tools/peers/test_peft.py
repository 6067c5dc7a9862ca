# SPDX-License-Identifier: Apache-2.0
"""PEFT's decoder tests on gated models: every model that they load has a gated head.

They name models of a hub; tiny ones of the same families are made here, the same at each load.
With PLAIN=1 they have no heads, which tells a fault of ours from one of the setting.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import dualhead_ext as dh

from .sources import upstream

decoders = upstream("peft", "tests.test_decoder_models", {"diffusers": "StableDiffusionPipeline"})
TestDecoderModels = decoders.TestDecoderModels

PLAIN = bool(os.environ.get("PLAIN"))
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 1024, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS = {
    "tiny-random-LlamaForCausalLM": transformers.LlamaConfig(**SHAPE),
    "tiny-random-MistralForCausalLM": transformers.MistralConfig(**SHAPE),
    "tiny-dummy-qwen2": transformers.Qwen2Config(**SHAPE),
    "tiny-random-GPT2LMHeadModel": transformers.GPT2Config(**GPT2),
    "tiny-random-gpt2": transformers.GPT2Config(**GPT2),
    "tiny-random-Gemma3ForCausalLM": transformers.Gemma3TextConfig(**SHAPE),
}


def model_of(name: Any, **kwargs: Any) -> PreTrainedModel:
    config = CONFIGS.get(str(name).split("/")[-1])
    if config is None:
        pytest.skip(f"inapplicable: {name} is on a hub")
    if "tie_word_embeddings" in kwargs:
        config = type(config)(**SHAPE, tie_word_embeddings=kwargs["tie_word_embeddings"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=kwargs.get("dtype"))
    model.name_or_path = model.config._name_or_path = str(name)
    if PLAIN:
        return model.eval()
    return dh.DualHeadForCausalLM.from_backbone(
        model.eval(), gate_num_heads=2, gate_head_dim=4, trial=False
    )


@pytest.fixture(autouse=True)
def _gated(monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_of)
