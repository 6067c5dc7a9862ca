# SPDX-License-Identifier: Apache-2.0
"""A folder that a serving engine loads: a backbone and the heads on it, side by side.

It holds the backbone's shards, tokenizer and configuration under their usual names, and the two
files of the heads (:mod:`.head_folder`). ``model.safetensors.index.json`` lists the backbone's
tensors alone, so that whatever reads a model through it passes the heads by. ``config.json`` is the
backbone's; its ``architectures`` names the gated model of :mod:`dualhead_ext.vllm`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# model_type -> (the gated architecture, the plain one)
ARCHITECTURES = {
    "llama": ("DualHeadLlamaForCausalLM", "LlamaForCausalLM"),
    "mistral": ("DualHeadMistralForCausalLM", "MistralForCausalLM"),
    "qwen2": ("DualHeadQwen2ForCausalLM", "Qwen2ForCausalLM"),
    "qwen3": ("DualHeadQwen3ForCausalLM", "Qwen3ForCausalLM"),
    "gemma2": ("DualHeadGemma2ForCausalLM", "Gemma2ForCausalLM"),
    "gemma3_text": ("DualHeadGemma3ForCausalLM", "Gemma3ForCausalLM"),
    "granite": ("DualHeadGraniteForCausalLM", "GraniteForCausalLM"),
    "phi3": ("DualHeadPhi3ForCausalLM", "Phi3ForCausalLM"),
}


def holds_backbone(folder: str | os.PathLike) -> bool:
    """Whether a folder of heads is one that :func:`export` wrote."""
    path = Path(folder, CONFIG)
    if not path.is_file() or not Path(folder, INDEX).is_file():
        return False
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    named = stored.get("architectures") if isinstance(stored, dict) else None
    return isinstance(named, list) and named[:1] in [[ours] for ours, _ in ARCHITECTURES.values()]
