# SPDX-License-Identifier: Apache-2.0
"""Support of transformers' Auto classes: ``AutoModelForCausalLM``, ``AutoTokenizer`` and
``pipeline`` load a folder of heads like any model's.

A registration runs while transformers is being imported (:mod:`.registration`). So it imports only
the module of one Auto class, and no module of this package that may be half imported.
"""

from __future__ import annotations

import os
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..config import MODEL_TYPE


class DualHeadPointer(PreTrainedConfig):
    """The ``config.json`` of a folder of heads."""

    model_type = MODEL_TYPE


class _Model:
    """The class that ``AutoModelForCausalLM`` calls for such a folder."""

    config_class = DualHeadPointer

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, config: Any = None, **options: Any):
        from .causal_lm import DualHeadForCausalLM

        return DualHeadForCausalLM.from_pretrained(folder, **options)


class _Tokenizer:
    """The class that ``AutoTokenizer`` calls: loads the tokenizer of the backbone that the folder
    names.
    """

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *arguments: Any, **options: Any):
        from transformers import AutoTokenizer

        from .builtin_backbones import backbone_path
        from .head_folder import read_config
        from .pretrained import named_backbone

        source = read_config(folder, options.get("revision"))["backbone"]
        name = named_backbone(os.fspath(folder), source)
        options = {k: v for k, v in options.items() if k not in ("revision", "_commit_hash")}
        return AutoTokenizer.from_pretrained(backbone_path(name), *arguments, **options)


def register_config() -> None:
    """Register folders of heads with ``AutoConfig``. It is safe to call it, and the functions
    below, more than once.
    """
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, DualHeadPointer, exist_ok=True)


def register_model() -> None:
    """Register with ``AutoModelForCausalLM``."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(DualHeadPointer, _Model, exist_ok=True)


def register_tokenizer() -> None:
    """Register with ``AutoTokenizer``."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    AutoTokenizer.register(DualHeadPointer, tokenizer_class=_Tokenizer, exist_ok=True)
