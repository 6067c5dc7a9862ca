# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of backbones: a few values of a few parameters, small enough for a JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..quantization.torchao_weights import is_torchao

# The most parameters in a fingerprint, and the values of each: a few kilobytes of JSON.
_PARAMETERS, VALUES = 32, 4
# float32, bfloat16 and float16 copies of one backbone agree to half an ulp of bfloat16, 2^-8.
_TOLERANCE = 2.0**-7
# Attribute of a parameter that has been sharded: what `_few_values` gave before, by version.
_KEPT = "_dualhead_values"


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The architecture and a few values of evenly spaced parameters of a gated model's backbone.

    The heads and adapters are left out, and so is an LM head that is trained or quantised.
    """
    head = model.get_output_embeddings()
    left_out = {id(p) for n, p in head.named_parameters() if "." in n or head.owns_lm_head}
    parameters = {
        name: parameter
        for name, parameter in _backbone_parameters(model)
        if _comparable(parameter) and parameter.numel() and id(parameter) not in left_out
    }
    step = max(1, math.ceil(len(parameters) / _PARAMETERS))
    values = {name: _few_values(parameters[name]) for name in list(parameters)[::step]}
    finite = {name: few for name, few in values.items() if all(map(math.isfinite, few))}
    return {"model_type": model.config.model_type, "parameters": finite}


def _backbone_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The named parameters without those of adapters. PEFT's layers hold the module that they
    replace as ``base_layer``, besides their own parameters.
    """
    layers = [f"{n}." for n, m in model.named_modules() if hasattr(m, "base_layer")]
    for name, parameter in model.named_parameters():
        wrapped = any(name.startswith(layer) for layer in layers)
        if not wrapped or ".base_layer." in name:
            yield name.replace(".base_layer.", "."), parameter


def _comparable(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and not parameter.is_meta and not is_torchao(parameter)


def _few_values(parameter: Tensor, version: int = 2) -> list[float]:
    """Evenly spaced values, including the first and the last. version: of the file format."""
    if (kept := getattr(parameter, _KEPT, None)) is not None:
        return kept[version]
    count = parameter.numel()
    if version == 1:  # computed in float32, so some indices are rounded differently
        indices = torch.linspace(0, count - 1, VALUES).long().clamp(max=count - 1).tolist()
    else:
        indices = [i * (count - 1) // (VALUES - 1) for i in range(VALUES)]
    places = [_unravel(index, parameter.shape) for index in indices]
    # Not with flatten(), which would copy a parameter that is not contiguous.
    return torch.stack([parameter.detach()[place] for place in places]).float().tolist()


@contextmanager
def keep_marks(module: nn.Module) -> Iterator[None]:
    """Parameters that the block puts in the place of a module's own keep their values here: to read
    those of a shard takes all processes.
    """
    values = {
        name: {version: _few_values(parameter, version) for version in (1, 2)}
        for name, parameter in module.named_parameters()
        if _comparable(parameter) and parameter.numel()
    }
    yield
    for name, parameter in module.named_parameters():
        if name in values:
            setattr(parameter, _KEPT, values[name])


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        place.append(position)
    return tuple(reversed(place))


def check_fingerprint(
    model: PreTrainedModel, stored: dict[str, Any], where: str, version: int = 2
) -> None:
    """Raise ValueError unless ``model`` is the backbone that ``stored`` describes, in any
    floating-point dtype. version: of the file format.
    """
    parameters = dict(_backbone_parameters(model))
    check_parameters(model.config.model_type, parameters, stored, where, version)


def check_parameters(
    model_type: str, parameters: dict[str, Tensor], stored: dict[str, Any], where: str, version: int
) -> None:
    """As :func:`check_fingerprint`, of parameters by their names. Those that are missing are not
    compared.
    """
    if model_type != stored["model_type"]:
        raise ValueError(
            f"{where}: its backbone must be a {stored['model_type']} model, got {model_type}"
        )
    for name, values in stored["parameters"].items():
        parameter = parameters.get(name)
        if parameter is None or not _comparable(parameter) or not parameter.numel():
            continue  # quantised or renamed here: nothing to compare
        got = _few_values(parameter, version)
        tolerance = _TOLERANCE * max(max(map(abs, values)), 1e-6)
        if not all(abs(a - b) <= tolerance for a, b in zip(values, got, strict=True)):
            raise ValueError(
                f"{where}: was trained on another backbone: parameter {name} "
                f"begins {values}, this one {got}"
            )
