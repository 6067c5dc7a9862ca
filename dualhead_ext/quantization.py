# SPDX-License-Identifier: Apache-2.0
"""Weight-only formats of the two heads: one registry, and what each means in plain PyTorch.

All are symmetric: ``W[v, i] = s[v] q[v, i]`` (int4: one s per group of 128 inputs). Leading
dimensions, such as the reward head's K, pass through. Tensors in memory and in files
(``lm_head.weight``, ``lm_head.weight_scale``, and the same two of ``reward_head``):

======  =======================  ==================  =====================
format  weight                   weight_scale, fp32  s
======  =======================  ==================  =====================
int8    (..., V, d) int8         (..., V)            max |W[v]| / 127
fp8     (..., V, d) e4m3fn       (..., V)            max |W[v]| / 448
int4    (..., V, d/2) uint8      (..., V, d/128)     max |W[v, group]| / 7.5
======  =======================  ==================  =====================

An int4 number q in -8..7 is stored as q + 8. Byte 64 j + i of a row holds input 128 j + i in its
low half and input 128 j + 64 + i in its high half, so that a run of bytes unpacks into two runs of
inputs. d must be a multiple of 128: a padded row would be read and multiplied for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INT4_GROUP = 128
_HALF = INT4_GROUP // 2


@dataclass(frozen=True)
class WeightFormat:
    """One format: its storage dtype and the two directions, weight (..., V, d) <-> (q, scale)."""

    dtype: torch.dtype
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, torch.dtype], Tensor]


def _row_scale(weight: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """fp32 weight and scale (..., 1). A row of zeros gets scale 1; a NaN makes its whole row NaN,
    through the scale: integers cannot hold one.
    """
    weight = weight.float()
    scale = weight.abs().amax(-1, keepdim=True) / largest
    # Below the smallest normal number a quotient by the scale would overflow.
    tiny = torch.finfo(torch.float32).tiny
    return weight, torch.where(scale < tiny, torch.ones_like(scale), scale)


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight, scale = _row_scale(weight, 127.0)
    q = torch.nan_to_num(weight / scale).round().clamp(-127, 127)
    return q.to(torch.int8), scale.squeeze(-1)


def _quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight, scale = _row_scale(weight, 448.0)
    q = torch.nan_to_num(weight / scale).clamp(-448, 448)
    return q.to(torch.float8_e4m3fn), scale.squeeze(-1)


def _dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.to(dtype) * scale.to(dtype).unsqueeze(-1)


def _quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.shape[-1] % INT4_GROUP:
        raise ValueError(
            f"quantize: int4 needs a hidden size that is a multiple of {INT4_GROUP}, "
            f"got {weight.shape[-1]}"
        )
    groups, scale = _row_scale(weight.unflatten(-1, (-1, INT4_GROUP)), 7.5)
    q = torch.nan_to_num(groups / scale).round().clamp(-8, 7).add(8).to(torch.uint8)
    packed = q[..., :_HALF] | (q[..., _HALF:] << 4)
    return packed.flatten(-2), scale.squeeze(-1)


def _dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    halves = packed.unflatten(-1, (-1, _HALF))
    q = torch.cat((halves & 15, halves >> 4), -1).to(dtype) - 8
    return (q * scale.to(dtype).unsqueeze(-1)).flatten(-2)


FORMATS = {
    "int8": WeightFormat(torch.int8, _quantize_int8, _dequantize_rows),
    "fp8": WeightFormat(torch.float8_e4m3fn, _quantize_fp8, _dequantize_rows),
    "int4": WeightFormat(torch.uint8, _quantize_int4, _dequantize_int4),
}
_BY_DTYPE = {weight_format.dtype: name for name, weight_format in FORMATS.items()}


def check_format(operator: str, name: Any) -> None:
    """Raise ValueError unless ``name`` is one of FORMATS."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"{operator}: format must be one of {', '.join(FORMATS)}, got {name!r}")


def format_of(weight: Tensor) -> str | None:
    """The format whose storage ``weight`` has; None for plain floating-point weights."""
    return _BY_DTYPE.get(weight.dtype)


@torch.no_grad()
def quantize(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Weight (..., V, d), floating point -> (q, scale fp32), as the table above says.

    Raises:
        ValueError: an unknown format, or int4 with d not a multiple of 128. TypeError: not a
            floating-point weight, or one that is quantised already.
    """
    check_format("quantize", name)
    if not weight.is_floating_point() or format_of(weight) is not None:
        raise TypeError(f"quantize: weight must be plain floating point, got {weight.dtype}")
    return FORMATS[name].quantize(weight.detach())


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What quantised numbers mean: (..., V, d) in ``dtype``; the format is known by its dtype.

    Raises:
        TypeError: ``weight`` has no quantised format's dtype.
    """
    name = format_of(weight)
    if name is None:
        raise TypeError(f"dequantize: weight must be quantised, got {weight.dtype}")
    return FORMATS[name].dequantize(weight, scale, dtype)


class QuantizedHead(nn.Module):
    """One or K linear heads in a format: weight and weight_scale as above, bias in the hidden
    states' dtype, ``compute_dtype``. Casts of the module leave weight and scale as they are; moves
    move them. Nothing in it trains.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        self.compute_dtype = dtype

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, name: str, dtype: torch.dtype
    ) -> QuantizedHead:
        """Quantise a floating-point weight (..., V, d)."""
        return cls(*quantize(weight, name), None if bias is None else bias.to(dtype), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedHead:
        # .half() and .to(dtype) convert every floating-point tensor: fp8 numbers and scales too.
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device))
        self.compute_dtype = probe.dtype
        for name in ("weight", "weight_scale"):
            moved = getattr(self, name).detach().to(probe.device)
            setattr(self, name, nn.Parameter(moved, requires_grad=False))
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedHead:
        """Raises RuntimeError for True: quantised heads do not train."""
        if requires_grad:
            raise RuntimeError("QuantizedHead: quantised heads cannot be trained")
        return self
