# SPDX-License-Identifier: Apache-2.0
"""Dual-head gated decoding: two linear heads and a per-token gate on a language model's hidden
states. README.md and docs/ show how to use it; `reference` defines the exact semantics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .build_info import build_info
from .model.registration import register_when_there

if TYPE_CHECKING:  # for type checkers and the API reference; at run time see `__getattr__`
    from . import data as data
    from . import functional as functional
    from . import ops as ops
    from . import reference as reference
    from .config import DualHeadConfig as DualHeadConfig
    from .head.dual_head import DualHead as DualHead
    from .model.attachment import detach as detach
    from .model.builtin_backbones import backbone_path as backbone_path
    from .model.causal_lm import DualHeadForCausalLM as DualHeadForCausalLM
    from .model.weak_to_strong import WeakToStrong as WeakToStrong
    from .train.trainer import DualHeadTrainer as DualHeadTrainer
    from .train.trainer import DualHeadTrainingArguments as DualHeadTrainingArguments

__version__ = "0.1.0"

# Public name -> module. Imported on first use: the core needs torch alone, so `import dualhead_ext`
# must not pull in transformers.
_EXPORTS = {
    "DualHeadConfig": "config",
    "DualHead": "head.dual_head",
    "DualHeadForCausalLM": "model.causal_lm",
    "detach": "model.attachment",
    "WeakToStrong": "model.weak_to_strong",
    "DualHeadTrainer": "train.trainer",
    "backbone_path": "model.builtin_backbones",
    "DualHeadTrainingArguments": "train.trainer",
}
_MODULES = ("data", "functional", "ops", "reference")

__all__ = ["__version__", "build_info", *_EXPORTS, *_MODULES]


register_when_there()  # AutoModelForCausalLM.from_pretrained(heads), pipeline(model=heads)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
