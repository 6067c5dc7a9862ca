# SPDX-License-Identifier: Apache-2.0
"""Files of a folder of heads for other tools: ``config.json``, by which transformers' Auto classes
recognise it (:mod:`.auto`), and a model card.

``config.json`` holds ``"model_type": "dualhead"`` and points to ``dualhead_config.json``, which
holds the configuration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MODEL_TYPE
from ..files.atomic import replace_files
from .builtin_backbones import BUILTIN_BACKBONES
from .head_folder import CONFIG_NAME, read_config

POINTER_NAME, CARD_NAME = "config.json", "README.md"
_MARK = "<!-- written anew at each save; remove this line to keep your own text -->"


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


@dataclass(frozen=True)
class Training:
    """A training run, as the model card describes it.

    Attributes:
        data: the source of the rows.
        rows: their number and kind, for instance "412 pairs".
        steps: optimizer steps.
        kl: mean KL of the mixture at strength 1 from the backbone, in nats per token.
        alpha: mean alpha at strength 1.
        accuracy: (share of pairs that the reward head ranks right, low, high), the 95 % interval.
        longer: the same share for the rule "the longer one".
        measured_on: which pairs, in words.
    """

    data: str
    rows: str
    steps: int
    kl: float
    alpha: float
    accuracy: tuple[float, float, float] | None = None
    longer: float | None = None
    measured_on: str | None = None


def describe_training(folder: Path, training: Training) -> None:
    """Write the model card of a folder of heads again, with the training run.

    Raises:
        OSError: the disk. ValueError: the folder's configuration is damaged.
    """
    write_card(folder, read_config(folder), training)


def write_card(folder: Path, stored: dict[str, Any], training: Training | None = None) -> None:
    """Write the model card ``README.md``, unless the folder has one that a person wrote.

    Args:
        stored: as for :func:`.head_folder.write_head_folder`.
    Raises:
        OSError: the disk.
    """
    path = folder / CARD_NAME
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
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
        f"{'' if training is None else _training(training)}"
        "## Use\n\n"
        "```python\n"
        "import dualhead_ext\n"
        "from transformers import AutoTokenizer\n\n"
        f'model = dualhead_ext.DualHeadForCausalLM.from_pretrained("{folder.name}"{backbone})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n"
        'text = "How do I keep bread fresh?"\n'
        "chats = tokenizer.chat_template is not None\n"
        "if chats:\n"
        '    turns = [{"role": "user", "content": text}]\n'
        "    text = tokenizer.apply_chat_template(\n"
        "        turns, tokenize=False, add_generation_prompt=True\n"
        "    )\n"
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chats)\n'
        "print(tokenizer.decode(model.generate(**inputs, strength=1.0, max_new_tokens=40)[0]))\n"
        "```\n\n"
        f"{_MARK}\n"
    )
    replace_files(folder, {CARD_NAME: str(card).encode()})


def _training(found: Training) -> str:
    lines = [
        "## Training and measured accuracy",
        "",
        f"Trained on {found.rows} of {found.data}, {found.steps} optimizer steps. At strength 1 "
        f"the mixture is {found.kl:.3g} nats per token from the backbone; mean alpha "
        f"{found.alpha:.3f}.",
        "",
    ]
    if found.accuracy is None:
        return "\n".join([*lines, "The accuracy was not measured: no pairs were held out.", "", ""])
    value, low, high = (f"{100 * share:.1f} %" for share in found.accuracy)
    return "\n".join(
        [
            *lines,
            f"| ranked by | accuracy on {found.measured_on} | 95 % interval |",
            "| --- | --- | --- |",
            f"| reward head | {value} | {low} to {high} |",
            f"| the longer one | {100 * found.longer:.1f} % | |",
            "",
            "",
        ]
    )
