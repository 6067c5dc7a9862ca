# SPDX-License-Identifier: Apache-2.0
"""Backbones for the benchmarks of whole models: random Llamas of any shape, and twins that share
their weights.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Llama:
    """The shape of a random Llama.

    Attributes:
        hidden: d.
        layers, heads: number of layers and of attention heads.
        intermediate: width of the MLPs.
        vocabulary: V.
        key_value_heads: number of key and value heads; None: as many as ``heads``.
        tied: whether the LM head shares the embedding's weights.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    key_value_heads: int | None = None
    tied: bool = False

    def build(
        self, device_type: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> PreTrainedModel:
        """Create the model directly on the device and in ``dtype``, without another copy."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )
        torch.manual_seed(0)
        with torch.device(device_type):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


TINY = Llama(64, 2, 4, 128, 512)
# 92 million parameters, 41 million of them in the embedding and the LM head.
MEDIUM = Llama(640, 10, 10, 1792, 32000)
SMOLLM2_135M = Llama(576, 30, 9, 1536, 49152, key_value_heads=3, tied=True)
# The sizes of TinyLlama and of Llama-2-7B.
LLAMA_1B = Llama(2048, 22, 32, 5632, 32000)
LLAMA_7B = Llama(4096, 32, 32, 11008, 32000)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares all parameters and buffers, so that one model can get a
    gated head while the other stays plain, without a second copy of the weights."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
