# SPDX-License-Identifier: Apache-2.0
"""Conversion of a linear layer that torchao has quantised to one of our formats.

torchao's weight is a tensor subclass in an ``nn.Linear``. If it is symmetric, weight-only and has
our granularity, its integers and scales are used unchanged, in our layout:
``Int8WeightOnlyConfig``, ``Float8WeightOnlyConfig`` with one scale per row, and
``IntxWeightOnlyConfig`` with int8 per row or int4 and ``PerGroup(128)``. ``Int4WeightOnlyConfig``
is not symmetric. torchao is not imported here: a program with such a weight has imported it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantization import FORMATS, format_of

_WEIGHTS = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


def is_torchao(weight: Tensor) -> bool:
    """Whether torchao has quantised this weight."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def check_lm_weight(operator: str, weight: Tensor, quantize: str | None) -> None:
    """Raise unless an LM head's weight is plain floating point, or quantised by torchao in the
    format ``quantize``.

    Raises:
        TypeError: quantised by something else.
        ValueError: quantised by torchao, but ``quantize`` is None or another format.
    """
    if not is_torchao(weight):
        if not weight.is_floating_point() or format_of(weight) is not None:
            raise TypeError(
                f"{operator}: lm_head.weight must be plain floating point or quantised by torchao, "
                f"got {type(weight).__name__} of {weight.dtype}"
            )
    elif quantize is None:
        raise ValueError(
            f"{operator}: lm_head.weight is torchao's {type(weight).__name__}: both heads are in "
            "one format, so pass quantize= to DualHeadForCausalLM.from_backbone or from_pretrained "
            f"to take its quantised weights over, or {_MAKE_PLAIN}"
        )
    elif found := _obstacle(weight, quantize):
        raise ValueError(_refusal(operator, weight, quantize, found))


_MAKE_PLAIN = "make it plain first: linear.weight = nn.Parameter(linear.weight.dequantize(), False)"


def _refusal(operator: str, weight: Tensor, name: str, found: str) -> str:
    return (
        f"{operator}: lm_head.weight is torchao's {type(weight).__name__}, whose weights cannot be "
        f"taken over as {name}: {found}. To round them again, {_MAKE_PLAIN}"
    )


def quantized_weights_of(operator: str, weight: Any, name: str) -> tuple[Tensor, Tensor]:
    """(q, scale fp32) in the format ``name`` of a torchao weight (V, d), bit for bit.

    Raises:
        ValueError: its weights are not in that format; the message says why, and how to round them
            again.
    """
    if found := _obstacle(weight, name):
        raise ValueError(_refusal(operator, weight, name, found))
    weight_format = FORMATS[name]
    q = weight.qdata.detach()
    if weight_format.pack is not None:
        q = weight_format.pack(q)
    scale = weight.scale.detach().float()
    return q.clone(), (scale.squeeze(-1) if weight_format.group is None else scale).clone()


def _obstacle(weight: Any, name: str) -> str | None:
    """Why ``weight`` is not of the format ``name``; None if it is."""
    if type(weight).__name__ not in _WEIGHTS:
        return f"expected one of {', '.join(_WEIGHTS)}"
    # The storage dtype identifies fp8 and int8; intx has an attribute for it.
    stored = getattr(weight, "target_dtype", weight.qdata.dtype)
    expected = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int4}[name]  # type: ignore[attr-defined]
    if stored != expected:
        return f"it holds {stored}"
    block, group = [1, FORMATS[name].group or weight.shape[-1]], list(weight.block_size)
    if group != block:
        return f"expected a scale for each block of {block}, got {group}"
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool(zero.any()):
        return "it is not symmetric"
    for attribute in ("act_quant_kwargs", "activation_quantization"):
        if getattr(weight, attribute, None) is not None:
            return "it quantises the hidden states too"
    if getattr(weight, "act_pre_scale", None) is not None:
        return "it scales the hidden states"
    return None
