# SPDX-License-Identifier: Apache-2.0
"""Nested state (optimizer, scheduler, random numbers) in one safetensors file, without pickle.

The tensors are the file's tensors. The nesting is JSON in its metadata, with tags for types that
JSON does not have: ``{"dict": [[key, value], ...]}``, ``{"list": [...]}``, ``{"tuple": [...]}``,
``{"tensor": name}``, ``{"float": "nan" | "inf" | "-inf"}``. Finite floats keep all their bits.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from torch import Tensor

from .checkpoint import CheckpointError
from .foreign import brief

FORMAT, FORMAT_VERSION = "dualhead-state", 1
_SEQUENCES = {"list": list, "tuple": tuple}


def save_state(path: str | os.PathLike, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, bools and None.

    Raises:
        TypeError: any other type; the message says where it is.
        OSError: the disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    version = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    try:
        save_file(tensors, path, metadata=version | {"tree": json.dumps(tree)})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_state(path: str | os.PathLike) -> Any:
    """The inverse of :func:`save_state`; tensors on the CPU.

    Raises:
        CheckpointError: not such a file, damaged, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: is not a complete safetensors file ({brief(error)})"
        ) from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not a file of the format {FORMAT}")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: has format version {brief(metadata.get('format_version'))}, this release "
            f"reads {FORMAT_VERSION}; update it"
        )
    try:
        return _decode(json.loads(metadata["tree"]), tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its tree is damaged ({brief(repr(error))})") from None


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A clone: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [
            [
                _encode(key, f"a key of {where}", tensors),
                _encode(entry, f"{where}[{key!r}]", tensors),
            ]
            for key, entry in value.items()
        ]
        return {"dict": items}
    for tag, kind in _SEQUENCES.items():
        if type(value) is kind:
            return {tag: [_encode(x, f"{where}[{i}]", tensors) for i, x in enumerate(value)]}
    raise TypeError(f"save_state: {where} is a {type(value).__name__}, which cannot be stored")


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("an untagged list")
        return tree
    ((tag, value),) = tree.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "float":
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[value]
    if tag == "dict":
        return {_decode(key, tensors): _decode(entry, tensors) for key, entry in value}
    return _SEQUENCES[tag](_decode(entry, tensors) for entry in value)
