# SPDX-License-Identifier: Apache-2.0
"""Backbones that come as one GGUF file. transformers reads it, once: what it reads is kept as
safetensors in a cache folder, where every later load is fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

from ..files.atomic import replace_files, sha256_of, synchronise

SUFFIX = ".gguf"
SOURCE_NAME = "gguf.json"  # in a converted folder: what it was asked for by
# Part of a converted folder's name. Raise it when `_convert` changes what it writes.
_CONVERSION = 1
_MAGIC = b"GGUF"
# What llama.cpp names the parts of a model: part and count.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

logger = logging.getLogger(__name__)


def is_gguf(name: str | os.PathLike) -> bool:
    """Whether a backbone's name is that of a GGUF file: of a path, or "owner/repository/file"."""
    return os.fspath(name).lower().endswith(SUFFIX)


def on_hub(name: str) -> tuple[str, str] | None:
    """("owner/repository", file) of the name of a GGUF file that is not a path, or None."""
    parts = name.split("/")
    if not is_gguf(name) or len(parts) < 3 or parts[0] in ("", ".", "..", "~"):
        return None
    return None if os.path.exists(name) else ("/".join(parts[:2]), "/".join(parts[2:]))


def check_file(path: str | os.PathLike) -> None:
    """Refuse a path that is no GGUF file, or one part of several; reads its first bytes.

    Raises:
        FileNotFoundError: there is none. ValueError: it is something else, or a part.
    """
    _check_whole(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"expected a GGUF file, got {os.fspath(path)}, which is not one")
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise ValueError(
            f"expected a GGUF file, got {os.fspath(path)}, which begins with {start!r}"
        )


def _check_whole(name: str) -> None:
    """Refuse the name of a part of a model: transformers reads one file."""
    part = _PART.search(name)
    if part is not None and int(part[2]) > 1:
        raise _not_whole(name, int(part[2]))


def _not_whole(name: str | os.PathLike, count: int) -> ValueError:
    return ValueError(
        f"expected a whole GGUF file, got {os.fspath(name)}, one of {count} parts; merge them "
        "first with llama.cpp's tool: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
    )


def converted(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a GGUF file's model: float32 safetensors, tokenizer with the file's chat
    template, configurations. Made on first use, below :func:`cache_folder`; four bytes a parameter.

    Args:
        name: a path, or "owner/repository/file.gguf" of the hub. revision: of the repository.
    Raises:
        FileNotFoundError, ValueError: as :func:`check_file`; a damaged file, one that lacks
            weights, or a model that transformers does not know. ImportError: gguf or accelerate
            is missing; says how to install it. OSError: the cache folder cannot be written, the
            hub not be reached.
    """
    path = name = os.path.expanduser(os.fspath(name))
    if (found := on_hub(name)) is not None:
        _check_whole(name)
        from transformers.utils import cached_file

        path = cached_file(*found, revision=revision)
    else:
        name = os.path.abspath(name)
    check_file(path)
    folder = convert_once(Path(path), re.sub(r"[^\w.-]", "_", Path(path).stem))
    _note_source(folder, name)
    return folder


def convert_once(source: Path, title: str) -> Path:
    """As :func:`converted`, of a file that is there. title: how a new folder's name begins; one
    that holds the same file under another title is as good.
    """
    end = f"-{sha256_of(source)[:16]}-{_CONVERSION}"
    parent = cache_folder()
    if (found := _folder_ending(parent, end)) is not None:
        return found
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{source.name}: reading a GGUF file needs the package {package}: "
                "pip install 'dualhead_ext[gguf]'"
            )
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{title}{end}"
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
            synchronise(parent)
    return folder


def source_of(folder: str | os.PathLike) -> str | None:
    """What :func:`converted` was last asked for to give this folder, a path in full; or None."""
    folder = Path(os.path.realpath(folder))
    if folder.parent != cache_folder().resolve() or not (folder / SOURCE_NAME).is_file():
        return None
    return json.loads((folder / SOURCE_NAME).read_text(encoding="utf-8"))


def _note_source(folder: Path, name: str) -> None:
    if source_of(folder) != name:
        with contextlib.suppress(OSError):  # a cache that others made need not be writable
            replace_files(folder, {SOURCE_NAME: json.dumps(name).encode() + b"\n"})


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/dualhead_ext``, by default ``~/.cache/dualhead_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualhead_ext"


def _folder_ending(parent: Path, end: str) -> Path | None:
    found = sorted(p for p in parent.glob(f"[!.]*{end}") if p.is_dir())
    return found[0] if found else None


def _convert(source: Path, folder: Path) -> None:
    """Write a GGUF file's model, tokenizer and configurations as Hugging Face has them.

    Raises:
        ValueError: the file is damaged, one part of several, or lacks weights.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": source.name, "local_files_only": True}
    try:
        fields = GGUFReader(source).fields
        parts, splits = (
            None if (value := fields.get(name)) is None else value.contents()
            for name in ("split.count", "tokenizer.ggml.pre")
        )
        if parts is not None and parts > 1:
            raise _not_whole(source, parts)
        found: Any = AutoModelForCausalLM.from_pretrained(
            source.parent,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **place,
        )
        model, loaded = found
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
    except (ValueError, LookupError, RuntimeError, struct.error) as error:
        raise ValueError(f"{source} cannot be read as a language model ({error})") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would make them up
        raise ValueError(
            f"{source} cannot be read as a language model: it lacks {len(missing)} weights, "
            f"{missing[0]} among them"
        )
    # The GGUF's title, which is no name of the hub.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    if splits == "smollm":
        _split_as_smollm(tokenizer)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None:
        tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)


def _split_as_smollm(tokenizer) -> None:
    """Each digit on its own, then as GPT-2: the file says it by a name that transformers does not
    read.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
