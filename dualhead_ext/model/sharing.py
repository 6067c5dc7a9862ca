# SPDX-License-Identifier: Apache-2.0
"""What a folder of heads holds for others: the ``config.json`` by which transformers' Auto classes
know it (:mod:`.auto`), and a model card.

``config.json`` says ``"model_type": "dualhead"`` and nothing else: ``dualhead_config.json`` stays
the authority.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files.atomic import replace_files
from .builtin_backbones import BUILTIN_BACKBONES
from .head_folder import CONFIG_NAME

POINTER_NAME, CARD_NAME = "config.json", "README.md"
MODEL_TYPE = "dualhead"


def write_pointer(folder: Path) -> None:
    """``config.json``, unless the folder has one: with ``save_full`` it is the backbone's.

    Raises:
        OSError: the disk.
    """
    if not (folder / POINTER_NAME).exists():
        stored = {
            "model_type": MODEL_TYPE,
            "architectures": ["DualHeadForCausalLM"],
            "dualhead_config": CONFIG_NAME,
        }
        replace_files(folder, {POINTER_NAME: json.dumps(stored, indent=2).encode() + b"\n"})


def write_card(folder: Path, stored: dict[str, Any]) -> None:
    """``README.md``, unless the folder has one: what a hub shows of the heads.

    Args:
        stored: as :func:`.head_folder.write_head_folder` takes it.
    Raises:
        OSError: the disk.
    """
    if (folder / CARD_NAME).exists():
        return
    from huggingface_hub import ModelCard, ModelCardData

    config, base = stored["dual_head"], stored["backbone"]["name_or_path"]
    named = base or "the backbone that the heads were trained on"
    data = ModelCardData(
        base_model=None if base in BUILTIN_BACKBONES else base,  # a hub's name, or none
        library_name="dualhead_ext",
        tags=["dual-head", "alignment", "reward"],
        pipeline_tag="text-generation",
    )
    tokenizer = f'dualhead_ext.backbone_path("{base}")' if base else '"path/to/it"'
    backbone = "" if base else ', backbone="path/to/it"'
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n"
        f"# Dual-Head heads for {named}\n\n"
        "A reward head and a gate that steer a frozen language model while it decodes.\n\n"
        "| | |\n| --- | --- |\n"
        f"| reward head | {config.reward_head}, rank {config.reward_rank} |\n"
        f"| gate | {config.gate} |\n"
        f"| objective | {config.preference} |\n"
        f"| objectives | {config.num_objectives} |\n"
        f"| mixture | of {'probabilities' if config.mix == 'probs' else 'logits'} |\n"
        f"| weights | {stored['quantized'] or 'full precision'} |\n\n"
        "```python\n"
        "import dualhead_ext\n"
        "from transformers import AutoTokenizer\n\n"
        f'model = dualhead_ext.DualHeadForCausalLM.from_pretrained("{folder.name}"{backbone})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n"
        'inputs = tokenizer("How do I keep bread fresh?", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, strength=1.0, max_new_tokens=40)[0]))\n"
        "```\n"
    )
    replace_files(folder, {CARD_NAME: str(card).encode()})
