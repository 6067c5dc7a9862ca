# SPDX-License-Identifier: Apache-2.0
"""Weight-only formats of the two heads: one registry, and their definition in plain PyTorch.

All are symmetric: ``W[v, i] = s[v] q[v, i]`` (int4: one s per group of 128 inputs). Leading
dimensions, such as the reward head's K, pass through. Tensors in memory and in files
(``lm_head.weight``, ``lm_head.weight_scale``, and the same two of ``reward_head``):

| format | weight              | weight_scale, fp32 | s; m = max abs(W) of the row or group    |
| ------ | ------------------- | ------------------ | ---------------------------------------- |
| int8   | (..., V, d) int8    | (..., V)           | m / 127                                  |
| fp8    | (..., V, d) e4m3fn  | (..., V)           | the best of 16 in [m / 448, 2m / 448)    |
| int4   | (..., V, d/2) uint8 | (..., V, d/128)    | the best of 24 of 0.65 to 1.05 times ±m / 8 |

"Best" is the least squared error of the row or group; ties go to the first. fp8 has the same
relative steps in every octave, so only the position of a row's maximum within its octave matters.
int4's s may be negative: int4 has -8 but not +8, and the sign decides which end of a group gets the
extra value.

An int4 value q in -8..7 is stored as q + 8. Byte 64 j + i of a row holds input 128 j + i in its low
half and input 128 j + 64 + i in its high half, so consecutive bytes unpack into two runs of inputs.
d must be a multiple of 128; padding would be read and multiplied in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rounding import best_scale, feedback_factor, round_with_feedback, rows_at_a_time

INT4_GROUP = 128
_HALF = INT4_GROUP // 2
_FP8_MAX = 448.0


@dataclass(frozen=True)
class WeightFormat:
    """One format. Rows of a weight are (R, G, d/G), with one scale (R, G, 1) per group."""

    dtype: torch.dtype  # of the storage
    group: int | None  # inputs that share a scale; None: the whole row
    largest: float  # the factors multiply the scale m / largest
    factors: tuple[float, ...]
    round: Callable[[Tensor], Tensor]  # W / s -> the nearest value of the format, fp32
    pack: Callable[[Tensor], Tensor] | None = None  # values (..., d) fp32 -> storage
    unpack: Callable[[Tensor], Tensor] | None = None  # storage -> integer values (..., d)
    coarse: bool = False  # rounds so coarsely that a head is calibrated even without hidden states

    def scale_of(self, groups: Tensor) -> Tensor:
        """The scales (R, G, 1) of groups (R, G, d/G)."""
        return best_scale(groups, self.largest, self.factors, self.round)


def _round_int8(x: Tensor) -> Tensor:
    return x.round().clamp_(-127, 127)


def _round_int4(x: Tensor) -> Tensor:
    return x.round().clamp_(-8, 7)


def _round_fp8(x: Tensor) -> Tensor:
    """Round to the nearest e4m3fn value, ties to even, as ``x.to(float8_e4m3fn)`` does; but that
    takes fifty times as long on the CPU.
    """
    x = x.clamp(-_FP8_MAX, _FP8_MAX)
    # Three bits after the leading one; steps of 2^-9 below 2^-6.
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.mul_(0.125).clamp_(min=2.0**-9)
    return x.div_(step).round_().mul_(step)


def _pack_int4(numbers: Tensor) -> Tensor:
    halves = numbers.unflatten(-1, (-1, INT4_GROUP)).add(8).to(torch.uint8)
    return (halves[..., :_HALF] | (halves[..., _HALF:] << 4)).flatten(-2)


def _unpack_int4(packed: Tensor) -> Tensor:
    halves = packed.unflatten(-1, (-1, _HALF))
    return torch.cat((halves & 15, halves >> 4), -1).to(torch.int8).sub_(8).flatten(-2)


FORMATS = {
    "int8": WeightFormat(torch.int8, None, 127.0, (1.0,), _round_int8),
    "fp8": WeightFormat(
        torch.float8_e4m3fn, None, _FP8_MAX, tuple(2 ** (i / 16) for i in range(16)), _round_fp8
    ),
    "int4": WeightFormat(
        torch.uint8,
        INT4_GROUP,
        8.0,
        tuple(sign * (0.65 + 0.4 * i / 11) for sign in (1, -1) for i in range(12)),
        _round_int4,
        _pack_int4,
        _unpack_int4,
        coarse=True,
    ),
}
_BY_DTYPE = {weight_format.dtype: name for name, weight_format in FORMATS.items()}


def check_format(operator: str, name: Any, hidden_size: int | None = None) -> None:
    """Raise ValueError unless ``name`` is in FORMATS and supports rows of ``hidden_size``."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"{operator}: format must be one of {', '.join(FORMATS)}, got {name!r}")
    group = FORMATS[name].group
    if hidden_size is not None and group is not None and hidden_size % group:
        raise ValueError(
            f"{operator}: {name} needs a hidden size that is a multiple of {group}, "
            f"got {hidden_size}"
        )


def format_of(weight: Tensor) -> str | None:
    """The name of the format of ``weight``; None for plain floating-point weights."""
    return _BY_DTYPE.get(weight.dtype)


def storage_shapes(
    name: str, shape: tuple[int, ...] | torch.Size
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of (weight, weight_scale) in a format, for a head (..., V, d)."""
    *rows, d = shape
    group = FORMATS[name].group
    if group is None:
        return (*rows, d), (*rows,)
    return (*rows, d // 2), (*rows, d // group)


def quantize(weight: Tensor, name: str, calibration: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight (..., V, d): returns (quantised weights, fp32 scales) in the layout that
    `FORMATS` defines.

    Integers cannot hold a NaN, so a NaN makes the scale NaN, and with it the whole row.

    Args:
        weight: (..., V, d), floating point.
        name: ``"int8"``, ``"fp8"`` or ``"int4"``.
        calibration: hidden states (..., d), floating point, like those that the weight will
            multiply. The rounding error of one input's weights is then compensated in the inputs
            that are not rounded yet, according to their correlation in these hidden states
            (:func:`dualhead_ext.quantization.rounding.round_with_feedback`, GPTQ's method). The
            scales stay the same. Default: round each weight to the nearest value.
    Raises:
        ValueError: an unknown format, int4 with d not a multiple of 128, or calibration of another
            shape, not finite, or beside a weight on meta.
        TypeError: not a floating-point weight, or one that is quantised already; calibration that
            is not a floating-point tensor.
    """
    _check_weight("quantize", weight)
    check_format("quantize", name, weight.shape[-1])
    return quantize_with(weight, name, calibration_factor("quantize", calibration, weight))


def _check_weight(operator: str, weight: Any) -> None:
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        got = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{operator}: weight must be a dense tensor (..., V, d), got {got}")
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"{operator}: weight must be (..., V, d) and not empty, got {tuple(weight.shape)}"
        )


@torch.no_grad()
def calibration_factor(operator: str, calibration: Tensor | None, weight: Tensor) -> Tensor | None:
    """The argument ``factor`` of :func:`quantize_with`, from hidden states (..., d). It serves all
    weights (..., d) on the device of ``weight``. None for None.
    """
    if calibration is None:
        return None
    if isinstance(calibration, Tensor) and calibration.layout != torch.strided:
        raise TypeError(f"{operator}: calibration must be dense, got {calibration.layout}")
    if not isinstance(calibration, Tensor) or not calibration.is_floating_point():
        got = calibration.dtype if isinstance(calibration, Tensor) else type(calibration).__name__
        raise TypeError(f"{operator}: calibration must be floating-point hidden states, got {got}")
    if calibration.is_meta:
        raise ValueError(f"{operator}: calibration must have values, got a tensor on meta")
    if weight.is_meta:
        raise ValueError(f"{operator}: calibration needs a weight with values, got one on meta")
    d = weight.shape[-1]
    if calibration.dim() < 1 or calibration.shape[-1] != d or calibration.numel() == 0:
        raise ValueError(
            f"{operator}: calibration must be (..., {d}) and not empty, "
            f"got {tuple(calibration.shape)}"
        )
    if not torch.isfinite(calibration).all():
        raise ValueError(f"{operator}: calibration must be finite, got NaN or infinite numbers")
    return feedback_factor(calibration.to(weight.device).reshape(-1, d))


# Enough rows to estimate the directions of all rows, even at d = 8192.
_STAND_INS = 2**15


@torch.no_grad()
def stand_ins(weight: Tensor, name: str) -> Tensor | None:
    """Calibration data if no hidden states are given: for a coarse format (int4) the rows of the LM
    head (V, d), every n-th so that at most 32768 are used; otherwise None.

    Hidden states point in the direction of the rows of likely tokens, so errors matter most in
    directions that many rows share. docs/quantization.md has measurements.
    """
    if not FORMATS[name].coarse:
        return None
    rows = weight.detach()[:: -(-weight.shape[0] // _STAND_INS)]
    rows = rows[torch.isfinite(rows).all(-1)]
    return rows if len(rows) else None


@torch.no_grad()
def quantize_with(weight: Tensor, name: str, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`quantize` with a factor from :func:`calibration_factor`."""
    if not weight.is_floating_point() or format_of(weight) is not None:
        raise TypeError(f"quantize: weight must be plain floating point, got {weight.dtype}")
    parts = [
        _quantize_rows(rows.float(), FORMATS[name], factor)
        for rows in weight.detach().flatten(0, -2).split(rows_at_a_time(weight.shape[-1], factor))
    ]
    q, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    shapes = storage_shapes(name, weight.shape)
    return q.view(shapes[0]), scale.view(shapes[1])


def _quantize_rows(
    rows: Tensor, weight_format: WeightFormat, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(quantised weights, scale (R, G)) of rows (R, d) fp32."""
    groups = rows.unflatten(-1, (-1, weight_format.group or rows.shape[-1]))
    scale = weight_format.scale_of(groups)
    if factor is None:
        numbers = weight_format.round(groups / scale).flatten(-2)
    else:
        numbers = round_with_feedback(rows, scale.squeeze(-1), factor, weight_format.round)
    numbers = torch.nan_to_num(numbers)  # a row that is not finite has a NaN scale
    if weight_format.pack is not None:
        return weight_format.pack(numbers), scale.squeeze(-1)
    return numbers.to(weight_format.dtype), scale.squeeze(-1)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of quantised weights: (..., V, d) in ``dtype`` (default float32). The dtype of
    ``weight`` determines the format.

    Raises:
        TypeError: ``weight`` is not quantised, ``scale`` is not a dense tensor of float32 or
            float64, or ``dtype`` is not a floating-point dtype.
        ValueError: shapes that contradict each other, or only one of the two on meta.
    """
    _check_weight("dequantize", weight)
    name = format_of(weight)
    if name is None:
        raise TypeError(f"dequantize: weight must be quantised, got {weight.dtype}")
    weight_format = FORMATS[name]
    if not isinstance(scale, Tensor) or scale.dtype not in (torch.float32, torch.float64):
        got = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"dequantize: scale must be a float32 or float64 tensor, got {got}")
    if scale.layout != torch.strided:
        raise TypeError(f"dequantize: scale must be dense, got {scale.layout}")
    if scale.is_meta != weight.is_meta:
        raise ValueError(
            f"dequantize: scale must be on {weight.device}, got a tensor on {scale.device}"
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dequantize: dtype must be a floating-point dtype, got {dtype!r}")
    d = weight.shape[-1] * (1 if weight_format.unpack is None else 2)
    shape = storage_shapes(name, (*weight.shape[:-1], d))[1]
    if scale.shape != shape:
        raise ValueError(f"dequantize: scale must be {shape}, got {tuple(scale.shape)}")
    if weight_format.unpack is not None:
        weight = weight_format.unpack(weight)
    scale = scale.to(dtype)
    if weight_format.group is None:
        return weight.to(dtype) * scale.unsqueeze(-1)
    groups = weight.to(dtype).unflatten(-1, (-1, weight_format.group))
    return (groups * scale.unsqueeze(-1)).flatten(-2)
