# SPDX-License-Identifier: Apache-2.0
"""Saving and loading of a dual-head model: the heads, and the name of their backbone. The files and
their checks are in `head_folder`, `head_files` and `fingerprint`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..quantization import check_format
from .backbones import backbone_post_processing, inside_peft, module_name
from .builtin_backbones import BUILTIN_BACKBONES, backbone_path, builtin_name
from .fingerprint import check_fingerprint, fingerprint
from .gguf_files import is_gguf, on_hub, source_of
from .head_files import check_head_state, head_state, load_head_state
from .head_folder import read_head_folder, write_head_folder
from .served_folder import holds_backbone
from .sharing import write_card, write_pointer

# Arguments of the backbone's own save_pretrained that do not apply to the heads' files.
_BACKBONE_ONLY = (
    "max_shard_size",
    "variant",
    "save_peft_format",
    "save_original_format",
    "distributed_checkpoint",
)
_HUB_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "revision")

logger = logging.getLogger(__name__)


def untie_lm_head(model: PreTrainedModel) -> None:
    """If the LM head shares its weight with the embedding, give it a copy, so that they can
    differ.
    """
    head: Any = model.get_output_embeddings()
    if getattr(model.get_input_embeddings(), "weight", None) is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


def save_heads(
    model: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool,
    state_dict: dict[str, Tensor] | None,
    push_to_hub: bool,
    token: str | bool | None,
    save_full: bool,
    kwargs: dict[str, Any],
) -> None:
    """:meth:`dualhead_ext.DualHeadForCausalLM.save_pretrained`."""
    if not kwargs.pop("safe_serialization", True):
        raise ValueError("save_pretrained: safe_serialization must be True: no pickles are written")
    known = (*_BACKBONE_ONLY, *_HUB_OPTIONS)
    if unknown := sorted(set(kwargs) - set(known)):
        raise TypeError(f"save_pretrained: unknown arguments {', '.join(unknown)}")
    if kwargs.get("variant") is not None and not save_full:
        raise ValueError("save_pretrained: variant is for the backbone: it needs save_full")
    plain_lm = model._plain_lm_weight() if save_full else None
    if save_full and plain_lm is None:
        raise RuntimeError(
            "save_pretrained: save_full: the LM head is quantised "
            f"({model.lm_head_module.quantized}) and its full precision is gone; save the "
            "backbone before quantize"
        )
    if not is_main_process:
        return
    folder, head = Path(save_directory), model.lm_head_module
    prefix = f"{module_name(model, head)}."
    given = None
    if state_dict is not None:
        given = {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}
    try:
        state = head_state(head, given)
    except ValueError as error:
        raise ValueError(f"save_pretrained: {error}") from None
    check_head_state(head.config, state, head.quantized, f"save_pretrained: {folder}")
    stored = {
        "dual_head": head.config,
        "quantized": head.quantized,
        "backbone": {
            "name_or_path": _portable_name(model.config._name_or_path),
            "local_path": _local_path(model.config._name_or_path),
            "revision": getattr(model.config, "_commit_hash", None),
            "fingerprint": fingerprint(model),
        },
    }
    _warn_of_adapters(model)
    folder.mkdir(parents=True, exist_ok=True)
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    before = model._get_files_timestamps(folder) if push_to_hub else {}
    write_head_folder(folder, stored, state)
    write_card(folder, stored)
    if not save_full:
        write_pointer(folder)
    if save_full:
        base: Any = type(model).__bases__[1]
        plain = model.state_dict() if state_dict is None else state_dict
        plain = {n: v for n, v in plain.items() if not _is_head(n)}
        if head.quantized is not None:
            plain.pop(f"{prefix}weight_scale", None)
            plain[f"{prefix}weight"] = plain_lm.detach()
        base.save_pretrained(model, folder, state_dict=plain, **kwargs)
    if push_to_hub:
        _upload(model, folder, before, token, **hub)


def _upload(
    model: Any,
    folder: Path,
    before: dict[str, float],
    token: str | bool | None,
    repo_id: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> None:
    """Upload the files of a folder that are newer than ``before`` to the hub."""
    from huggingface_hub import create_repo

    repo = create_repo(repo_id or folder.name, private=private, token=token, exist_ok=True)
    model._upload_modified_files(folder, repo.repo_id, before, token=token, **options)


def _warn_of_adapters(model: Any) -> None:
    layers = [m for _, m in model.named_modules() if hasattr(m, "base_layer")]
    if layers:
        names = sorted({a for m in layers for a in getattr(m, "active_adapters", ())})
        logger.warning(
            "save_pretrained: the backbone has adapters (%s), which the heads' files do not "
            "contain. Save them with their own library, for example with "
            "peft.get_peft_model_state_dict, and restore them before you use the heads",
            ", ".join(names) or "none of them active",
        )


def load_heads(
    cls: Any,
    pretrained_model_name_or_path: str | os.PathLike,
    backbone: str | os.PathLike | PreTrainedModel | None,
    dtype: torch.dtype | str | None,
    device_map: Any,
    revision: str | None,
    quantize: str | None,
    trial: bool,
    options: dict[str, Any],
) -> Any:
    """:meth:`dualhead_ext.DualHeadForCausalLM.from_pretrained`; cls: that class."""
    folder = os.fspath(pretrained_model_name_or_path)
    stored, state = read_head_folder(folder, revision)
    config, source = stored["dual_head"], stored["backbone"]
    where, quantized = f"from_pretrained: {folder}", stored["quantized"]
    if quantize is not None:
        check_format("from_pretrained", quantize, config.hidden_size)
        if quantized not in (None, quantize):
            raise ValueError(
                f"{where} holds heads in {quantized}, which cannot become {quantize}: quantise "
                "the full-precision heads instead"
            )
    check_head_state(config, state, quantized, where)
    if backbone is None:
        backbone = named_backbone(folder, source)
    loaded = _load_backbone(backbone, dtype, device_map, source["revision"], options)
    linear = loaded.get_output_embeddings()
    for name, there in (
        ("vocab_size", linear.out_features),
        ("hidden_size", linear.in_features),
        *backbone_post_processing(loaded.config).items(),
    ):
        if getattr(config, name) != there:
            raise ValueError(
                f"from_pretrained: the heads in {folder} have {name} {getattr(config, name)}, "
                f"the backbone has {there}"
            )
    check_fingerprint(loaded, source["fingerprint"], where, stored["format_version"])
    model = cls._extend("from_pretrained", loaded, config.to_dict(), quantized or quantize, trial)
    if quantized is None and "lm_head.weight" in state:
        untie_lm_head(model)
    load_head_state(model.lm_head_module, state, where, quantized)
    if quantized is None and quantize is not None:
        model.quantize(quantize)
    return model.eval()


def _portable_name(name: str | None) -> str | None:
    """The backbone's name on any machine, a built-in's or a hub name; or None."""
    if not name:
        return None
    if os.path.isdir(name):  # a path of this machine means nothing on another
        return builtin_name(name) or _hub_only(source_of(name))
    return name if _is_hub_name(name) else None


def _local_path(name: str | None) -> str | None:
    """The absolute path of a backbone without a portable name, or None."""
    if not name or not os.path.isdir(name) or _portable_name(name) is not None:
        return None
    return source_of(name) or os.path.abspath(name)


def _hub_only(name: str | None) -> str | None:
    return name if name is not None and _is_hub_name(name) else None


def _is_hub_name(name: str) -> bool:
    if is_gguf(name):
        found = on_hub(name)
        name = found[0] if found is not None else ""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def named_backbone(folder: str, source: dict[str, Any]) -> str:
    """The backbone of a folder of heads: the folder itself if `export` put one beside them, a
    built-in's or hub name, or a local path that still exists. source: ``backbone`` of the folder's
    configuration.

    Raises:
        ValueError: there is none, or the name is ambiguous.
    """
    if holds_backbone(folder):
        return folder
    name, local = source["name_or_path"], source["local_path"]
    if name is None and local is not None and _is_backbone(local):
        return local
    if name is None:
        was = f"{local[:200]!r}, which is not here" if local else "a local folder"
        raise ValueError(
            f"from_pretrained: {folder} names no backbone (it was {was}); pass backbone="
        )
    if name in BUILTIN_BACKBONES:
        return name
    if not _is_hub_name(name):
        raise ValueError(
            f"from_pretrained: {folder} names the backbone {name[:200]!r}, which is not a hub name"
        )
    if os.path.exists(name):
        raise ValueError(
            f"from_pretrained: {folder} names the backbone {name!r} of the hub, but the working "
            "directory has a file or folder of this name; pass backbone= to choose one"
        )
    return name


def _is_backbone(path: str) -> bool:
    """Whether an absolute path is a model's folder or a GGUF file."""
    if not os.path.isabs(path):
        return False
    return os.path.isfile(path if is_gguf(path) else os.path.join(path, "config.json"))


def _is_head(name: str) -> bool:
    return ".reward_head." in name or (".gate." in name and "lm_head" in name)


def _load_backbone(
    backbone: Any, dtype: Any, device_map: Any, revision: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    backbone = inside_peft(backbone)
    if isinstance(backbone, PreTrainedModel):
        if options:
            raise TypeError(
                f"from_pretrained: unknown arguments {', '.join(sorted(options))}; arguments of a "
                "backbone's from_pretrained need a path or hub name, not a model"
            )
        return backbone
    return AutoModelForCausalLM.from_pretrained(
        backbone_path(backbone, options.pop("gguf_file", None), revision),
        dtype=dtype or "auto",
        device_map=device_map,
        revision=revision,
        **{"trust_remote_code": False} | options,
    )
