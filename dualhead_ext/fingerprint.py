# SPDX-License-Identifier: Apache-2.0
"""What tells backbones apart: a few values of a few parameters, small enough for a JSON file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .torchao_weights import is_torchao

# Parameters and values per parameter in a fingerprint: a few kilobytes of JSON that no other
# backbone shares.
_PARAMETERS, VALUES = 32, 4
# Values agree between float32, bfloat16 and float16 copies of one backbone to half an ulp of
# bfloat16, 2^-8.
_TOLERANCE = 2.0**-7


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The architecture, and a few values of evenly chosen parameters of a gated model's backbone.

    The heads are left out, and an LM head that is trained or quantised with them.
    """
    head = model.get_output_embeddings()
    left_out = {id(p) for n, p in head.named_parameters() if "." in n or head.owns_lm_head}
    names = [
        name
        for name, parameter in model.named_parameters()
        if _comparable(parameter) and parameter.numel() and id(parameter) not in left_out
    ]
    step = max(1, math.ceil(len(names) / _PARAMETERS))
    values = {name: _few_values(model.get_parameter(name)) for name in names[::step]}
    return {"model_type": model.config.model_type, "parameters": values}


def _comparable(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and not is_torchao(parameter)


def _few_values(parameter: Tensor) -> list[float]:
    flat = parameter.detach().flatten()
    where = torch.linspace(0, flat.numel() - 1, VALUES, device=flat.device).long()
    return flat[where].float().tolist()


def check_fingerprint(model: PreTrainedModel, stored: dict[str, Any], where: str) -> None:
    """Raise ValueError unless ``model`` is the backbone that ``stored`` describes, in any floating
    dtype.
    """
    if model.config.model_type != stored["model_type"]:
        raise ValueError(
            f"{where}: its backbone must be a {stored['model_type']} model, "
            f"got {model.config.model_type}"
        )
    parameters = dict(model.named_parameters())
    for name, values in stored["parameters"].items():
        parameter = parameters.get(name)
        if parameter is None or not _comparable(parameter):
            continue  # quantised or renamed here: nothing to compare
        got = _few_values(parameter)
        tolerance = _TOLERANCE * max(max(map(abs, values)), 1e-6)
        if not all(abs(a - b) <= tolerance for a, b in zip(values, got, strict=True)):
            raise ValueError(
                f"{where}: was trained on another backbone: parameter {name} "
                f"begins {values}, this one {got}"
            )
