# SPDX-License-Identifier: Apache-2.0
"""The folder format for serving engines: a backbone and its heads in one folder.

It contains the backbone's shards, tokenizer and configuration under their usual names, and the two
files of the heads (:mod:`.head_folder`). ``model.safetensors.index.json`` lists only the backbone's
tensors, so other programs ignore the heads. ``config.json`` is the backbone's, except that
``architectures`` names the gated model of :mod:`dualhead_ext.vllm`.
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
    """Whether a folder of heads was written by :func:`export` and so contains the backbone."""
    path = Path(folder, CONFIG)
    if not path.is_file() or not Path(folder, INDEX).is_file():
        return False
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    named = stored.get("architectures") if isinstance(stored, dict) else None
    return isinstance(named, list) and named[:1] in [[ours] for ours, _ in ARCHITECTURES.values()]
