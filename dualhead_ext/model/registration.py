# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers' Auto classes. Importing this package must not import
transformers, so the registration happens when the later of the two is imported. Each Auto class has
its own module, which a program may import without the others.
"""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Module of transformers -> the function of `auto` that registers with the class in it.
_REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": "register_config",
    "transformers.models.auto.modeling_auto": "register_model",
    "transformers.models.auto.tokenization_auto": "register_tokenizer",
}


def register_when_there() -> None:
    """Register now with the Auto classes that are imported, and with others after their import."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _REGISTRATIONS:
        if name in sys.modules:
            _register(name)


def _register(name: str) -> None:
    from . import auto

    getattr(auto, _REGISTRATIONS[name])()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the Auto classes, with a loader that registers after the import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _REGISTRATIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then the registration."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module.__name__)
