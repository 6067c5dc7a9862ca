# SPDX-License-Identifier: Apache-2.0
"""Modules that hold quantised weights: casts and moves, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import dequantize


class QuantizedStorage(nn.Module):
    """Holds ``weight`` and ``weight_scale`` of :mod:`dualhead_ext.quantization` once
    :meth:`hold` gave it some; until then it is a module like any other.

    A cast changes ``compute_dtype``, the dtype of the hidden states, and leaves the quantised
    weights as they are. A move to a device moves them.
    """

    weight: Tensor
    compute_dtype: torch.dtype

    def hold(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Take the place of the present weight: a parameter that is shared stays as it is
        elsewhere.
        """
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.compute_dtype = dtype

    def _holds(self) -> bool:
        return "weight_scale" in self._parameters

    def dequantized(self) -> Tensor:
        """The dequantised weights, (..., V, d) in ``compute_dtype``."""
        return dequantize(self.weight.detach(), self.weight_scale.detach()).to(self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not self._holds():
            return super()._apply(fn, recurse)
        numbers = self._parameters["weight"], self._parameters["weight_scale"]
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=numbers[0].device))
        # Seen as integers, which .half() and .to(dtype) leave alone; they would convert every
        # floating-point tensor, fp8 weights and scales too.
        weight, scale = (
            fn(tensor.detach().view(torch.uint8)).view(tensor.dtype).view(tensor.shape)
            for tensor in numbers
        )
        self._parameters["weight"] = self._parameters["weight_scale"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self.hold(weight, scale, probe.dtype)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Raises RuntimeError for True once quantised: quantised heads do not train."""
        if requires_grad and self._holds():
            raise RuntimeError(f"{type(self).__name__}: quantised heads cannot be trained")
        return super().requires_grad_(requires_grad)


class QuantizedHead(QuantizedStorage):
    """One or K linear heads in a format: weight and weight_scale, bias in the hidden states'
    dtype. Nothing in it trains.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.hold(weight, scale, dtype)
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True), False)
        )
