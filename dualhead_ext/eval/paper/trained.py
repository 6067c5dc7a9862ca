# SPDX-License-Identifier: Apache-2.0
"""Writing and loading folders of trained systems: written atomically, safetensors and JSON only."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from ...model.causal_lm import DualHeadForCausalLM
from ...model.head_folder import CONFIG_NAME

ADAPTER_NAME = "adapter_config.json"
RECORD_NAME = "training.json"


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` at the end; on an error it is removed.

    Raises:
        FileExistsError: ``out`` exists and is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"new_folder: expected a new or empty folder, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of transformers."""
    before = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers_logging.enable_progress_bar()


def weights_digest(folder: Path) -> str:
    """SHA-256 of a folder's safetensors files.

    Raises:
        FileNotFoundError: the folder has none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"weights_digest: {folder} holds no safetensors file")
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """``training.json``: what was trained, on what, and the logs.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(record, indent=2, allow_nan=False)
    (folder / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record that :func:`write_record` wrote.

    Raises:
        FileNotFoundError: nothing was trained there.
    """
    return json.loads((Path(folder) / RECORD_NAME).read_text(encoding="utf-8"))


def check_finite(model: nn.Module, name: str) -> None:
    """Raise FloatingPointError if a parameter of a trained model is not finite."""
    for key, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FloatingPointError(f"{name}: parameter {key} is not finite after training")


def load_policy(
    folder: Path,
    backbone: Path | None = None,
    dtype: torch.dtype = torch.float32,
    merge: bool = True,
) -> nn.Module:
    """A causal language model that training wrote: a full copy, an adapter, or a gated head on its
    backbone. In eval mode.

    Args:
        folder: a folder that a function of :mod:`.training` returned, or a backbone.
        backbone: the backbone that it was trained on; needed unless ``folder`` is a full copy.
            Paths stored in files are never followed.
        dtype: dtype of the weights.
        merge: merge an adapter into the weights; otherwise return a PeftModel.
    Raises:
        ValueError: the backbone is missing or is not the one of the training.
    """
    folder = Path(folder)
    if (folder / CONFIG_NAME).is_file():
        base = None if backbone is None else str(backbone)  # from_pretrained checks the fingerprint
        return DualHeadForCausalLM.from_pretrained(folder, backbone=base, dtype=dtype)
    auto = AutoModelForCausalLM
    if (folder / ADAPTER_NAME).is_file():
        base = auto.from_pretrained(_backbone(folder, backbone), dtype=dtype)
        return _attach(base, folder, merge)
    return auto.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def load_reward_model(
    folder: Path, backbone: Path | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A sequence classifier with one label that training wrote; arguments as of
    :func:`load_policy`. An adapter is merged.

    Raises:
        ValueError: as :func:`load_policy`; also if the folder has no trained score.
    """
    folder = Path(folder)
    if not any("score." in name for name in _tensor_names(folder)):
        raise ValueError(f"load_reward_model: {folder} holds no trained score")
    if (folder / ADAPTER_NAME).is_file():
        return _attach(fresh_reward_model(_backbone(folder, backbone), dtype), folder, merge=True)
    auto = AutoModelForSequenceClassification
    return auto.from_pretrained(folder, dtype=dtype, num_labels=1, local_files_only=True).eval()


def fresh_reward_model(backbone: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A sequence classifier with one label: the backbone's decoder, and a new linear score."""
    policy = load_policy(backbone, dtype=dtype)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    setattr(model, model.base_model_prefix, policy.base_model)
    return model


def _tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def _attach(base: nn.Module, folder: Path, merge: bool) -> nn.Module:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folder)
    return (model.merge_and_unload() if merge else model).eval()


def _backbone(folder: Path, backbone: Path | None) -> Path:
    """``backbone``, if it is the one that ``folder`` was trained on."""
    if backbone is None:
        raise ValueError(f"load: {folder} holds no whole model: pass backbone=, its folder")
    expected, got = read_record(folder)["backbone_sha256"], weights_digest(backbone)
    if got != expected:
        raise ValueError(
            f"load: {folder} was trained on another backbone: expected weights with SHA-256 "
            f"{expected}, got {got} in {backbone}"
        )
    return Path(backbone)


def finite_logs(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """A trainer's log history as plain numbers, without wall-clock times.

    Raises:
        FloatingPointError: a loss or gradient norm that is not finite.
    """
    kept = []
    for entry in history:
        check_log(entry)
        numbers = {k: float(v) for k, v in entry.items() if _is_figure(k, v)}
        kept.append(numbers)
    return kept


def _is_figure(name: str, value: Any) -> bool:
    clock = ("runtime", "per_second", "total_flos")
    return isinstance(value, (int, float)) and not any(word in name for word in clock)


def check_log(entry: dict[str, Any]) -> None:
    """Raise FloatingPointError for a loss or gradient norm that is not finite."""
    for name in ("loss", "grad_norm", "train_loss"):
        value = entry.get(name)
        if value is not None and not math.isfinite(float(value)):
            raise FloatingPointError(
                f"training: {name} is {value} at step {entry.get('step', 'unknown')}"
            )
