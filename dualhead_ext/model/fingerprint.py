# SPDX-License-Identifier: Apache-2.0
"""What tells backbones apart: a few values of a few parameters, small enough for a JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..quantization.torchao_weights import is_torchao

# Parameters and values per parameter in a fingerprint: a few kilobytes of JSON that no other
# backbone shares.
_PARAMETERS, VALUES = 32, 4
# Values agree between float32, bfloat16 and float16 copies of one backbone to half an ulp of
# bfloat16, 2^-8.
_TOLERANCE = 2.0**-7


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The architecture, and a few values of evenly chosen parameters of a gated model's backbone.

    The heads are left out, an LM head that is trained or quantised with them, and adapters.
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
    """named_parameters as they are without adapters: PEFT's layers hold the module that they
    replace as ``base_layer``, beside their own parameters.
    """
    layers = [f"{n}." for n, m in model.named_modules() if hasattr(m, "base_layer")]
    for name, parameter in model.named_parameters():
        wrapped = any(name.startswith(layer) for layer in layers)
        if not wrapped or ".base_layer." in name:
            yield name.replace(".base_layer.", "."), parameter


def _comparable(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and not parameter.is_meta and not is_torchao(parameter)


def _few_values(parameter: Tensor, version: int = 2) -> list[float]:
    """Evenly chosen values, the first and the last among them. version: of the file's format."""
    count = parameter.numel()
    if version == 1:  # float32, so not every index is the floor of the exact one
        indices = torch.linspace(0, count - 1, VALUES).long().clamp(max=count - 1).tolist()
    else:
        indices = [i * (count - 1) // (VALUES - 1) for i in range(VALUES)]
    places = [_unravel(index, parameter.shape) for index in indices]
    # Not through flatten(), which copies a parameter that is not contiguous.
    return torch.stack([parameter.detach()[place] for place in places]).float().tolist()


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        place.append(position)
    return tuple(reversed(place))


def check_fingerprint(
    model: PreTrainedModel, stored: dict[str, Any], where: str, version: int = 2
) -> None:
    """Raise ValueError unless ``model`` is the backbone that ``stored`` describes, in any floating
    dtype. version: of the format of the file that holds it.
    """
    if model.config.model_type != stored["model_type"]:
        raise ValueError(
            f"{where}: its backbone must be a {stored['model_type']} model, "
            f"got {model.config.model_type}"
        )
    parameters = dict(_backbone_parameters(model))
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
