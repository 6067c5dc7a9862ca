# SPDX-License-Identifier: Apache-2.0
"""The folder of a gated head: two files that are checked against each other.

``dualhead_config.json`` holds

- ``format_version``: 2. Version 1 had no hashes, and ``"full"`` was the only reward head.
- ``dual_head``: the fields of :class:`DualHeadConfig`.
- ``quantized``: a name in :data:`dualhead_ext.config.FORMAT_NAMES`, or null.
- ``backbone``: ``name_or_path`` (a hub name or a built-in backbone), ``revision`` and
  ``fingerprint``. For a local folder or GGUF file also its ``local_path``, which is valid on the
  machine where the heads were saved only. The backbone found there must have the fingerprint too.
- ``weights_sha256``: the hash of the other file.
- ``sha256``: the hash of this file's contents without this key, as JSON with sorted keys and
  without spaces.

``dualhead_model.safetensors`` holds gate.*, reward_head.*, and lm_head.* only if it was trained or
quantised; quantised weights have a weight_scale.

Reading involves no pickle, executes nothing, and follows no path of the folder's files out of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import FORMAT_NAMES, DualHeadConfig
from ..files.atomic import leftovers, replace_files, sha256_of
from ..files.foreign import brief, shown
from .fingerprint import VALUES

FORMAT_VERSION = 2
CONFIG_NAME = "dualhead_config.json"
WEIGHTS_NAME = "dualhead_model.safetensors"

# The values in version 1 of fields that it did not have. Today's defaults may differ.
_VERSION_1 = {"reward_head": "full", "preference": "log_prob", "kl_curve": None}
_HASHES = ("weights_sha256", "sha256")
_KEYS = {"format_version", "dual_head", "quantized", "backbone", *_HASHES}
# A configuration with its fingerprint takes a few kilobytes, and so does a header.
_MAX_CONFIG_BYTES, _MAX_HEADER_BYTES = 2**20, 2**16

logger = logging.getLogger(__name__)


# --- writing --------------------------------------------------------------------------------------


def write_head_folder(folder: Path, stored: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write both files. After a crash the folder holds the old pair or the new one. Leftovers of
    earlier crashes are removed.

    Args:
        stored: dual_head (:class:`DualHeadConfig`), quantized, backbone.
        state: contiguous tensors on the CPU that do not share memory.
    Raises:
        OSError: the disk; the old pair stays.
    """
    weights = save(state, metadata={"format": "pt"})
    stored = {
        "format_version": FORMAT_VERSION,
        **stored,
        "dual_head": stored["dual_head"].to_dict(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    stored["sha256"] = _own_sha256(stored)
    replace_files(folder, {WEIGHTS_NAME: weights, CONFIG_NAME: _config_bytes(stored)})


def without_local_path(folder: Path) -> None:
    """Remove the local path of the backbone from a folder's configuration.

    Raises:
        see :func:`read_config`; OSError: the disk.
    """
    stored = read_config(folder)
    if stored["backbone"]["local_path"] is None:
        return
    stored["backbone"]["local_path"] = None
    stored["dual_head"] = stored["dual_head"].to_dict()
    stored["sha256"] = _own_sha256(stored)
    replace_files(folder, {CONFIG_NAME: _config_bytes(stored)})


def _config_bytes(stored: dict[str, Any]) -> bytes:
    return json.dumps(stored, indent=2, allow_nan=False).encode() + b"\n"


def _own_sha256(stored: dict[str, Any]) -> str:
    rest = {key: value for key, value in stored.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# --- reading --------------------------------------------------------------------------------------


def read_head_folder(
    folder: str | os.PathLike, revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the result of :func:`read_config`, the tensors) of a local folder or a hub repository. Their
    hashes are checked. The tensors are memory-mapped: copy those that must outlive the file.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: a damaged or foreign file, or a newer
            format; the message names the file.
    """
    folder = os.fspath(folder)
    path = _file_of(folder, WEIGHTS_NAME, revision)
    _check_header(path)
    stored = read_config(folder, revision)
    if stored.get("weights_sha256") is None:
        logger.warning(
            "%s was saved without hashes, so damage to its files cannot be detected; save it again "
            "to add them",
            folder,
        )
    else:
        if (found := sha256_of(path)) != stored["weights_sha256"]:
            stored = _unfinished_config(folder, found)
        if stored is None:
            raise ValueError(
                f"from_pretrained: {path} is damaged or belongs to another {CONFIG_NAME}: its "
                "SHA-256 is not the one stored there"
            )
    try:
        return stored, load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not a complete safetensors file ({brief(error)})"
        ) from error


def _unfinished_config(folder: str, weights_sha256: str) -> dict[str, Any] | None:
    """If the last save was killed between its two files: the configuration that belongs to the new
    weights. Otherwise None.
    """
    if not os.path.isdir(folder):
        return None
    for path, _ in leftovers(Path(folder), (CONFIG_NAME,)):
        try:
            stored = _parse(_file_of(folder, path.name, None))
        except ValueError:
            continue
        if stored.get("weights_sha256") == weights_sha256:
            logger.warning(
                "%s: the last save was interrupted; reading its configuration from %s", folder, path
            )
            return stored
    return None


def read_config(folder: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """The checked contents of a folder's ``dualhead_config.json``, ``dual_head`` as a
    :class:`DualHeadConfig`.

    Raises:
        see :func:`read_head_folder`.
    """
    return _parse(_file_of(os.fspath(folder), CONFIG_NAME, revision))


def _file_of(folder: str, name: str, revision: str | None) -> Path:
    """The path of a file in a local folder or a hub repository. It must be a regular file directly
    in the folder.
    """
    if not os.path.isdir(folder):
        if os.path.exists(folder) or folder.startswith((".", "/", "~")):
            raise FileNotFoundError(f"from_pretrained: {folder} is not a folder of heads")
        from transformers.utils import cached_file

        return Path(cached_file(folder, name, revision=revision))
    path = Path(folder) / name
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"from_pretrained: {folder} holds no {name}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"from_pretrained: {path} must be a regular file")
    return path


def _parse(path: Path) -> dict[str, Any]:
    try:
        stored = _json_of(path)
        version = stored["format_version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"format_version must be a whole number from 1, got {version!r}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"it has format version {version}, this release reads up to {FORMAT_VERSION}; "
                "update dualhead_ext"
            )
        if "sha256" in stored and stored["sha256"] != _own_sha256(stored):
            raise ValueError(
                "it was changed after it was saved: its SHA-256 differs; if you edited it, "
                'remove the key "sha256"'
            )
        if unknown := sorted(set(stored) - _KEYS):
            raise ValueError(f"unknown keys {shown(unknown)}")
        _check_backbone(stored["backbone"])
        if stored.setdefault("quantized", None) not in (None, *FORMAT_NAMES):
            raise ValueError(
                f"quantized must be null or one of {', '.join(FORMAT_NAMES)}, "
                f"got {stored['quantized']!r}"
            )
        dual_head = stored["dual_head"]
        if not isinstance(dual_head, dict):
            raise ValueError(f"dual_head must be an object, got {dual_head!r}")
        if version == 1:
            known = {field.name for field in fields(DualHeadConfig)}
            dual_head = {k: v for k, v in _VERSION_1.items() if k in known} | dual_head
        stored["dual_head"] = DualHeadConfig.from_dict(dual_head)
    except KeyError as error:
        raise ValueError(
            f"from_pretrained: {path} is not a dual-head configuration (it has no {brief(error)})"
        ) from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not a dual-head configuration ({brief(error)})"
        ) from error
    return stored


def _json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Duplicate keys and NaN are refused."""
    if (size := path.stat().st_size) > _MAX_CONFIG_BYTES:
        raise ValueError(f"it has {size} bytes, at most {_MAX_CONFIG_BYTES} are expected")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return value

    value = json.loads(
        path.read_text(encoding="utf-8"),
        object_pairs_hook=unique,
        parse_float=finite,
        parse_constant=finite,
    )
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got a {type(value).__name__}")
    return value


def _check_backbone(backbone: Any) -> None:
    if not isinstance(backbone, dict):
        raise ValueError(f"backbone must be an object, got {backbone!r}")
    for name in ("name_or_path", "revision", "local_path"):
        if not isinstance(backbone.setdefault(name, None), (str, type(None))):
            raise ValueError(f"backbone.{name} must be a string or null")
    marks = backbone["fingerprint"]
    if not isinstance(marks, dict) or not isinstance(marks["model_type"], str):
        raise ValueError("backbone.fingerprint must hold model_type and parameters")
    if not isinstance(marks["parameters"], dict):
        raise ValueError("backbone.fingerprint.parameters must be an object")
    for name, values in marks["parameters"].items():
        if (
            not isinstance(values, list)
            or len(values) != VALUES
            or not all(type(value) is float for value in values)
        ):
            raise ValueError(f"backbone.fingerprint: {name[:80]} must be {VALUES} decimal numbers")


def _check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is too long or cut off, before it is parsed."""
    with open(path, "rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if length is None or length > min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
        problem = "it is too short" if length is None else f"its header would have {length} bytes"
        raise ValueError(f"from_pretrained: {path} is not a complete safetensors file ({problem})")
