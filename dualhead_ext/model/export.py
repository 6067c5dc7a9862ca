# SPDX-License-Identifier: Apache-2.0
"""Writes a folder for serving engines; `served_folder` describes it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..files.atomic import synchronise, write_durably
from ..files.foreign import brief
from .backbones import backbone_post_processing
from .builtin_backbones import backbone_path
from .fingerprint import check_parameters
from .head_files import check_head_state
from .head_folder import read_head_folder, write_head_folder
from .pretrained import named_backbone
from .served_folder import ARCHITECTURES, CONFIG, INDEX, WEIGHTS

# Other files of a backbone's folder that are copied if they exist.
_COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


def export(
    heads: str | os.PathLike,
    output: str | os.PathLike,
    backbone: str | os.PathLike | None = None,
    symbolic: bool = False,
) -> Path:
    """Write a folder that vLLM serves with the gate, and that plain transformers and plain vLLM
    load as the backbone.

    Args:
        heads: a folder or hub name that ``save_pretrained`` wrote, in full precision.
        output: a new folder, or an empty one. Weights are hard links where the file system allows
            it, copies otherwise.
        backbone: a folder, GGUF file, hub name or built-in backbone instead of the one that the
            heads name.
        symbolic: use symbolic links, for a temporary folder.
    Returns:
        output.
    Raises:
        FileNotFoundError, ValueError: the heads or their backbone cannot be read or do not belong
            together; the backbone's architecture is not in `ARCHITECTURES`; the heads are quantised
            or include a trained LM head; ``output`` is not empty.
        OSError: a disk error. Nothing is left behind.
    """
    heads, output = os.fspath(heads), Path(output)
    where = f"export: {heads}"
    stored, state = read_head_folder(heads)
    check_head_state(stored["dual_head"], state, stored["quantized"], where)
    if stored["quantized"] is not None:
        raise ValueError(
            f"{where} holds heads in {stored['quantized']}; engines quantise in their own way: "
            "export the heads in full precision that they were made from"
        )
    if "lm_head.weight" in state:
        raise ValueError(
            f"{where} holds an LM head that was trained with the heads; only heads that leave the "
            "backbone's as it is can be served"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"export: {output} must be a new folder, or an empty one")
    source = stored["backbone"]
    if backbone is None:
        backbone = named_backbone(heads, source)
    folder = _local(backbone_path(backbone, revision=source["revision"]), source["revision"])
    config = _config(folder)
    weight_map = _weight_map(folder)
    _check_backbone(folder, weight_map, stored, where)
    staging = output.with_name(f".{output.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write(staging, folder, config, weight_map, symbolic)
        source |= {"local_path": None}
        kept = {name: stored[name] for name in ("dual_head", "quantized", "backbone")}
        write_head_folder(staging, kept, {name: value.clone() for name, value in state.items()})
        if output.exists():
            output.rmdir()
        os.rename(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    synchronise(output.absolute().parent)
    return output


def _local(path: str, revision: str | None) -> Path:
    """The folder of a path or hub name."""
    if os.path.isdir(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, "*.safetensors", INDEX, *_COMPANIONS]
    return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))


def _config(folder: Path) -> dict[str, Any]:
    """The backbone's configuration, with the gated architecture's name."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"export: a backbone of the kind {kind!r} cannot be served with its heads; those that "
            f"can are {', '.join(ARCHITECTURES)}"
        )
    config.pop("auto_map", None)  # never run code from a checkpoint
    return config | {"architectures": [ARCHITECTURES[kind][0]]}


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> the shard that contains it."""
    if (folder / INDEX).is_file():
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if any(os.path.basename(shard) != shard for shard in found.values()):
            raise ValueError(f"export: {folder / INDEX} names files outside of its folder")
        return found
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"export: {folder} holds no safetensors; save the backbone anew with transformers' "
            "save_pretrained"
        )
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def _check_backbone(
    folder: Path, weight_map: dict[str, str], stored: dict[str, Any], where: str
) -> None:
    """Raise ValueError unless the heads were trained on this backbone; compares a few weights."""
    from transformers import AutoConfig

    config, own = AutoConfig.from_pretrained(folder), stored["dual_head"]
    text = config.get_text_config(decoder=True)
    sizes = {"vocab_size": text.vocab_size, "hidden_size": text.hidden_size}
    for name, there in (sizes | backbone_post_processing(config)).items():
        if getattr(own, name) != there:
            raise ValueError(
                f"{where}: the heads have {name} {getattr(own, name)}, the backbone in {folder} "
                f"has {there}"
            )
    marks = stored["backbone"]["fingerprint"]
    try:
        parameters = {
            name: _tensor(folder / weight_map[name], name)
            for name in marks["parameters"]
            if name in weight_map
        }
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"export: {folder} is damaged ({brief(error)})") from error
    if not parameters:
        raise ValueError(f"{where}: {folder} holds none of the parameters of the heads' backbone")
    check_parameters(text.model_type, parameters, marks, where, stored["format_version"])


def _tensor(shard: Path, name: str) -> Tensor:
    with safetensors.safe_open(shard, "pt") as file:  # memory-mapped: only used parts are read
        return file.get_tensor(name)


def _write(
    staging: Path, folder: Path, config: dict[str, Any], weight_map: dict[str, str], symbolic: bool
) -> None:
    """Write the backbone's part of the folder."""
    total = 0
    for shard in sorted(set(weight_map.values())):
        _link(folder / shard, staging / shard, symbolic)
        total += (staging / shard).stat().st_size
    for name in _COMPANIONS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, value in ((INDEX, index), (CONFIG, config)):
        write_durably(staging / name, json.dumps(value, indent=2).encode() + b"\n")


def _link(source: Path, target: Path, symbolic: bool) -> None:
    """Link a file, or copy it if links are not possible."""
    source = source.resolve()  # the hub's cache contains symbolic links
    try:
        (os.symlink if symbolic else os.link)(source, target)
    except OSError:
        shutil.copyfile(source, target)
        synchronise(target)
