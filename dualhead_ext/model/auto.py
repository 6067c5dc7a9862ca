# SPDX-License-Identifier: Apache-2.0
"""A folder of heads as transformers' Auto classes meet it: ``AutoModelForCausalLM``,
``AutoTokenizer`` and ``pipeline`` take it as they take any model's.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from .builtin_backbones import backbone_path
from .head_folder import read_config
from .sharing import MODEL_TYPE


class DualHeadPointer(PreTrainedConfig):
    """The ``config.json`` of a folder of heads."""

    model_type = MODEL_TYPE


class _Model:
    """What ``AutoModelForCausalLM`` calls for such a folder."""

    config_class = DualHeadPointer

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, config: Any = None, **options: Any):
        from .causal_lm import DualHeadForCausalLM

        return DualHeadForCausalLM.from_pretrained(folder, **options)


class _Tokenizer:
    """What ``AutoTokenizer`` calls: the tokenizer of the folder, or of the backbone it names."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *arguments: Any, **options: Any):
        from .pretrained import named_backbone

        source = read_config(folder, options.get("revision"))["backbone"]
        name = named_backbone(os.fspath(folder), source["name_or_path"])
        options = {k: v for k, v in options.items() if k not in ("revision", "_commit_hash")}
        return AutoTokenizer.from_pretrained(backbone_path(name), *arguments, **options)


def register() -> None:
    """Make the Auto classes know folders of heads. A second call changes nothing."""
    AutoConfig.register(MODEL_TYPE, DualHeadPointer, exist_ok=True)
    AutoModelForCausalLM.register(DualHeadPointer, _Model, exist_ok=True)
    AutoTokenizer.register(DualHeadPointer, tokenizer_class=_Tokenizer, exist_ok=True)
