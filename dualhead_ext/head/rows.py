# SPDX-License-Identifier: Apache-2.0
"""Conversion of what callers pass per request (numbers, lists, tensors) to the (B,) tensors that
the operators take, with checks. `controls` defines the ranges.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def dense(operator: str, name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """Return ``value`` if it is a dense tensor with data.

    Args:
        device: where the tensor is needed. A meta tensor, which has no data, is accepted for the
            meta device only. Default: not checked.
    Raises:
        TypeError: not a tensor, or a sparse one. ValueError: on the meta device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{operator}: {name} must be dense, got {value.layout}")
    if device is not None and value.device.type == "meta" != device.type:
        raise ValueError(f"{operator}: {name} must be on {device}, got a tensor on meta")
    return value


def per_row(
    operator: str,
    name: str,
    limits: Any,
    value: Any,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    fill: Callable[[str, float, torch.dtype], Tensor] | None = None,
) -> Tensor | None:
    """``value`` as a (B,) tensor of ``dtype`` on ``device``; None stays None.

    A number applies to every row; a list or tensor has one number per row. The numbers in a tensor
    are not checked, since that would synchronise with its device.

    Args:
        limits: a :class:`dualhead_ext.head.controls.Limits`.
        fill: makes a (B,) tensor from a number (memoised by a cache); default ``torch.full``.
    Raises:
        TypeError: not a number, list or tensor. ValueError: out of range, not finite, or a length
            other than B.
    """
    if value is None:
        return None
    expected = limits.expected
    if isinstance(value, Tensor):
        dense(operator, name, value, device)
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(
                f"{operator}: {name} must hold {expected}, got a tensor of {value.dtype}"
            )
        if value.dim() == 0:
            value = value.expand(batch_size)
        if value.shape != (batch_size,):
            raise ValueError(
                f"{operator}: {name} must be ({batch_size},), got {tuple(value.shape)}"
            )
        return value.to(device=device, dtype=dtype)
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    largest = torch.finfo(dtype).max if dtype.is_floating_point else sys.maxsize
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"{operator}: {name} must be {expected}, or one per row, got {number!r}"
            )
        # isfinite() raises for an integer that is too large for a float.
        if isinstance(number, int) or math.isfinite(number):
            wrong = abs(number) > largest or (dtype == torch.int32 and number != int(number))
        else:
            wrong = not limits.infinite
        if wrong or not limits.hold(number):
            raise ValueError(f"{operator}: {name} must be {expected}, got {number!r}")
    if dtype != torch.int32:
        numbers = [float(number) for number in numbers]
    if isinstance(value, (list, tuple)):
        if len(numbers) != batch_size:
            raise ValueError(f"{operator}: {name} must be ({batch_size},), got ({len(numbers)},)")
        return torch.tensor(numbers, dtype=dtype, device=device)
    if fill is not None:
        return fill(name, numbers[0], dtype)
    return torch.full((batch_size,), numbers[0], dtype=dtype, device=device)


def objective_rows(
    operator: str,
    value: Any,
    batch_size: int,
    num_objectives: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Objective weights as (B, K) from (K,) or (B, K); None stays None (1/K each).

    Raises:
        TypeError: not numbers. ValueError: another shape, or a number that is not finite.
    """
    if value is None:
        return None
    try:
        weights = torch.as_tensor(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"{operator}: objective_weights must be numbers, (K,) or (B, K), got {value!r}"
        ) from error
    dense(operator, "objective_weights", weights, device)
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"{operator}: objective_weights must hold numbers, got {weights.dtype}")
    if not isinstance(value, Tensor) and not torch.isfinite(weights.double()).all():
        raise ValueError(f"{operator}: objective_weights must be finite, got {value!r}")
    if weights.shape not in ((num_objectives,), (batch_size, num_objectives)):
        raise ValueError(
            f"{operator}: objective_weights must be (K,) = ({num_objectives},) or (B, K) = "
            f"({batch_size}, {num_objectives}), got {tuple(weights.shape)}"
        )
    weights = weights.to(device=device, dtype=dtype)
    return weights.expand(batch_size, num_objectives).contiguous()
