# SPDX-License-Identifier: Apache-2.0
"""Shared code of the commands that load models: paths, devices, and quiet transformers."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..model import gguf_files
from ..model.builtin_backbones import BUILTIN_BACKBONES, backbone_path
from .errors import UserError, argument, one_line


def check_backbone(option: str, name: str) -> None:
    """Raise UserError if a name looks like a local folder or GGUF file but does not exist. Loads
    nothing.
    """
    if name in BUILTIN_BACKBONES or not _looks_local(name) or os.path.isdir(name):
        return
    if gguf_files.is_gguf(name):
        with argument(option):
            gguf_files.check_file(os.path.expanduser(name))
    else:
        raise UserError(f"{option}: expected a folder or a GGUF file, got {name}, which is not one")


def check_heads(arguments: Namespace) -> None:
    """Raise UserError if the names of the heads or their backbone cannot be right, before heavy
    modules are imported.
    """
    heads, backbone = arguments.heads, arguments.backbone
    if not os.path.isdir(heads) and (_looks_local(heads) or heads.count("/") != 1):
        raise UserError(f"heads: expected a folder written by train, got {heads}, which is not one")
    if backbone is not None:
        check_backbone("--backbone", backbone)


def _looks_local(name: str) -> bool:
    if os.path.exists(name) or name.startswith((".", "/", "~")):
        return True
    if gguf_files.is_gguf(name):
        return gguf_files.on_hub(name) is None
    return name.count("/") > 1


@contextmanager
def loading(option: str, name: str) -> Iterator[None]:
    """:func:`.errors.argument` around the loading of ``name``, a folder or a hub name. The error
    says which of the two was expected.
    """
    check_backbone(option, name)
    with argument(option):
        looks_local = _looks_local(backbone_path(name))
        try:
            yield
        except OSError as error:
            if looks_local:
                raise
            raise UserError(
                f"{option}: expected a folder or a name on the hub, got {name!r} "
                f"({one_line(error)})"
            ) from error


def quiet_transformers(backbone: str | None) -> None:
    """Import transformers without its progress bars and log messages, and offline for a built-in
    backbone.
    """
    if backbone in BUILTIN_BACKBONES:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging  # first: the extra is named by it

    from huggingface_hub.utils import logging as hub_logging  # isort: skip

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # hides its retries; the last failure is an exception


def check_device(name: str) -> None:
    """Raise UserError for a CUDA device that does not exist. The message says what exists."""
    import torch

    if not name.startswith("cuda"):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        there = f"{count} CUDA devices" if count else "no CUDA device"
        raise UserError(
            f"--device: expected a device that torch {torch.__version__} sees, got "
            f"{name}; it sees {there}"
        )


def load(arguments: Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder of heads, and of its backbone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..model.attachment import detach
    from ..model.causal_lm import DualHeadForCausalLM

    check_device(arguments.device)
    heads, backbone = arguments.heads, arguments.backbone
    if backbone is not None:
        with loading("--backbone", backbone):
            path = backbone_path(backbone)
            backbone = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with loading("heads", heads):
        model = DualHeadForCausalLM.from_pretrained(
            heads, backbone=backbone, quantize=arguments.quantize
        )
    with argument("--backbone"):
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    backbone_only = getattr(arguments, "backbone_only", False)
    if backbone_only and model.lm_head_module.quantized is None:
        model = detach(model)
    elif backbone_only:  # the full-precision LM head is gone
        model = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype="auto")
    cuda = arguments.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else arguments.device
    return model if device == "auto" else model.to(device), tokenizer
