# SPDX-License-Identifier: Apache-2.0
"""transformers' own modelling tests (``ModelTesterMixin``) over five families, plain and gated.

The source archive has tests/test_modeling_common.py alone: neither the generation tests nor the
model folders are in it. Plain models are there to tell a fault of ours from one of the setting.
"""

from __future__ import annotations

import sys
import unittest
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dualhead_ext as dh
from dualhead_ext.model.pretrained import DualHeadFilesMixin

from .sources import upstream

ABSENT = {
    "tests.exporters.test_export": "ExportTesterMixin",
    "tests.generation.test_utils": "GenerationTesterMixin",
}
common = upstream("transformers", "tests.test_modeling_common", ABSENT)

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": (LlamaForCausalLM, LlamaConfig, SHAPE),
    "Mistral": (MistralForCausalLM, MistralConfig, SHAPE),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config, SHAPE),
    "GPT2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "Gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, SHAPE | {"sliding_window": 4}),
}


def gated(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``base`` whose constructor attaches heads."""

    class Gated(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            dh.DualHeadForCausalLM.from_backbone(
                self, gate_num_heads=2, gate_head_dim=8, trial=False
            )
            self.requires_grad_(True)

    Gated.__name__ = base.__name__
    Gated.__qualname__, Gated.__module__ = base.__qualname__, base.__module__
    return Gated


class Sizes:
    """The attributes that upstream's tests need of a model family's tester."""

    batch_size, seq_length, num_hidden_layers, hidden_size = 3, 7, 2, 32
    num_attention_heads, is_training = 2, True
    encoder_seq_length = key_length = 7

    def __init__(self, parent: Any, config_class: type, fields: dict[str, Any]) -> None:
        self.parent, self._class, self._fields = parent, config_class, fields

    def get_config(self) -> Any:
        return self._class(**self._fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def case(family: str, kind: str) -> type[unittest.TestCase]:
    base, config_class, fields = FAMILIES[family]
    model_class = gated(base) if kind == "Gated" else base

    class Case(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)

        def setUp(self) -> None:
            self.model_tester = Sizes(self, config_class, fields)
            # Save the whole state in transformers' own format; heads-only folders are tested
            # elsewhere.
            whole = patch.object(
                DualHeadFilesMixin, "save_pretrained", PreTrainedModel.save_pretrained
            )
            whole.start()
            self.addCleanup(whole.stop)

    return type(f"{kind}{family}", (Case,), {"__module__": __name__})


for _family in FAMILIES:
    for _kind in ("Plain", "Gated"):
        setattr(sys.modules[__name__], f"{_kind}{_family}", case(_family, _kind))
