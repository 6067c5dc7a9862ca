# SPDX-License-Identifier: Apache-2.0
"""Backbones in one GGUF file. At first use transformers reads the file, and the model is stored as
safetensors in a cache folder; later loads read that folder, which is fast.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.atomic import replace_files, sha256_of, synchronise

SUFFIX = ".gguf"
SOURCE_NAME = "gguf.json"  # in a converted folder: the name under which it was requested last
# Part of a converted folder's name. Increase it when `_convert` changes what it writes.
_CONVERSION = 1
_MAGIC = b"GGUF"
# llama.cpp's names of the parts of a model: part and count.
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

logger = logging.getLogger(__name__)


def is_gguf(name: str | os.PathLike) -> bool:
    """Whether a backbone's name, a path or "owner/repository/file", is that of a GGUF file."""
    return os.fspath(name).lower().endswith(SUFFIX)


def on_hub(name: str) -> tuple[str, str] | None:
    """("owner/repository", file) if a GGUF file's name is not a path, else None."""
    parts = name.split("/")
    if not is_gguf(name) or len(parts) < 3 or parts[0] in ("", ".", "..", "~"):
        return None
    return None if os.path.exists(name) else ("/".join(parts[:2]), "/".join(parts[2:]))


def check_file(path: str | os.PathLike) -> None:
    """Check that a path is a whole GGUF file, by its name and its first bytes.

    Raises:
        FileNotFoundError: no such file. ValueError: not a GGUF file, or one part of several.
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
    """Refuse the name of one part of a model: transformers reads a single file."""
    part = _PART.search(name)
    if part is not None and int(part[2]) > 1:
        raise _not_whole(name, int(part[2]))


def _not_whole(name: str | os.PathLike, count: int) -> ValueError:
    return ValueError(
        f"expected a whole GGUF file, got {os.fspath(name)}, one of {count} parts; merge them "
        "first with llama.cpp's tool: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
    )


def converted(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a GGUF file's model: float32 safetensors, the tokenizer with the file's chat
    template, and configurations. It is created at first use in :func:`cache_folder`, and takes four
    bytes per parameter.

    Args:
        name: a path, or "owner/repository/file.gguf" on the hub. revision: of the repository.
    Raises:
        FileNotFoundError, ValueError: see :func:`check_file`.
        ValueError: a damaged file, one that lacks weights, or a model unknown to transformers.
        ImportError: gguf or accelerate is missing; the message says how to install it.
        OSError: the cache folder cannot be written, or the hub cannot be reached.
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
    """:func:`converted` for an existing file. title: the beginning of a new folder's name. A folder
    with the same file and another title is used too.
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
    # One process converts, others wait. After a crash the next process removes the staging folder.
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
    """The name or absolute path for which :func:`converted` last returned this folder, or None."""
    folder = Path(os.path.realpath(folder))
    if folder.parent != cache_folder().resolve() or not (folder / SOURCE_NAME).is_file():
        return None
    return json.loads((folder / SOURCE_NAME).read_text(encoding="utf-8"))


def _note_source(folder: Path, name: str) -> None:
    if source_of(folder) != name:
        with contextlib.suppress(OSError):  # another user's cache may be read-only
            replace_files(folder, {SOURCE_NAME: json.dumps(name).encode() + b"\n"})


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/dualhead_ext``, by default ``~/.cache/dualhead_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualhead_ext"


def _folder_ending(parent: Path, end: str) -> Path | None:
    found = sorted(p for p in parent.glob(f"[!.]*{end}") if p.is_dir())
    return found[0] if found else None


def _convert(source: Path, folder: Path) -> None:
    """Write a GGUF file's model, tokenizer and configurations in Hugging Face's formats.

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
    if missing := sorted(loaded["missing_keys"]):  # transformers would initialise them randomly
        raise ValueError(
            f"{source} cannot be read as a language model: it lacks {len(missing)} weights, "
            f"{missing[0]} among them"
        )
    # The GGUF's title is not a hub name.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    _set_special_tokens(tokenizer, fields)
    if splits == "smollm":
        _split_as_smollm(tokenizer)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None:
        tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)


def _set_special_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Set the tokens that the file names. transformers 5.17 takes the beginning of a text for its
    end, ignores the padding, and removes spaces before punctuation when it decodes.
    """
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (field := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            token = tokenizer.convert_ids_to_tokens(int(field.contents()))
            setattr(tokenizer, f"{ours}_token", token)
    tokenizer.clean_up_tokenization_spaces = False


def _split_as_smollm(tokenizer) -> None:
    """Split digits one by one, then as GPT-2 does. The file names this pre-tokenizer, but
    transformers does not read the name.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
