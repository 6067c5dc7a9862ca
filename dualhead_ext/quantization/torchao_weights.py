# SPDX-License-Identifier: Apache-2.0
"""Numbers of a linear layer that torchao has quantised, as those of one of our formats.

torchao's weight is a tensor subclass in an ``nn.Linear``. Where it is symmetric, weight-only and
has our granularity, its integers and scales are ours in another layout and are taken over as they
are: of ``Int8WeightOnlyConfig`` and ``Float8WeightOnlyConfig`` with a scale per row (their
default), and of ``IntxWeightOnlyConfig`` with int8 per row or with int4 and ``PerGroup(128)``.
``Int4WeightOnlyConfig`` is not symmetric. torchao itself is not imported: whoever made such a
weight has it.
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
    """Raise unless an LM head's weight is plain floating point, or torchao's in the format
    ``quantize``.

    Raises:
        TypeError: quantised by something else.
        ValueError: torchao's, and ``quantize`` is None or another format.
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
        f"taken over as {name}: {found}. To round them anew, {_MAKE_PLAIN}"
    )


def quantized_weights_of(operator: str, weight: Any, name: str) -> tuple[Tensor, Tensor]:
    """(q, scale fp32) in the format ``name`` of a torchao weight (V, d), bit for bit.

    Raises:
        ValueError: its weights are not in that format; says which of its properties stands
            against it, and how to round anew.
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
    # fp8 and int8 say what they are by their storage, intx beside it.
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
