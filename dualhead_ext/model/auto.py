# SPDX-License-Identifier: Apache-2.0
"""A folder of heads as transformers' Auto classes meet it: ``AutoModelForCausalLM``,
``AutoTokenizer`` and ``pipeline`` take it as they take any model's.

A registration runs inside somebody's import of transformers (:mod:`.registration`): it imports the
module of one Auto class, and nothing of this package that may be half imported then.
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
        from transformers import AutoTokenizer

        from .builtin_backbones import backbone_path
        from .head_folder import read_config
        from .pretrained import named_backbone

        source = read_config(folder, options.get("revision"))["backbone"]
        name = named_backbone(os.fspath(folder), source)
        options = {k: v for k, v in options.items() if k not in ("revision", "_commit_hash")}
        return AutoTokenizer.from_pretrained(backbone_path(name), *arguments, **options)


def register_config() -> None:
    """Make ``AutoConfig`` know folders of heads. A second call changes nothing, here and below."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, DualHeadPointer, exist_ok=True)


def register_model() -> None:
    """The same for ``AutoModelForCausalLM``."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(DualHeadPointer, _Model, exist_ok=True)


def register_tokenizer() -> None:
    """The same for ``AutoTokenizer``."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    AutoTokenizer.register(DualHeadPointer, tokenizer_class=_Tokenizer, exist_ok=True)
