# SPDX-License-Identifier: Apache-2.0
"""Modules that hold quantised weights: casts, moves, and refused operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import dequantize


class QuantizedStorage(nn.Module):
    """Holds ``weight`` and ``weight_scale`` of :mod:`dualhead_ext.quantization` after a call of
    :meth:`hold`; before that it is an ordinary module.

    A cast changes ``compute_dtype``, the dtype of the hidden states, but not the quantised weights.
    A move to a device moves them.
    """

    weight: Tensor
    compute_dtype: torch.dtype

    def hold(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Replace the current weight. Another module that shares it keeps it."""
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
        # Viewed as integers, which .half() and .to(dtype) do not convert. They would convert all
        # floating-point tensors, including fp8 weights and scales.
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
        """Raises RuntimeError for True if quantised: quantised heads cannot be trained."""
        if requires_grad and self._holds():
            raise RuntimeError(f"{type(self).__name__}: quantised heads cannot be trained")
        return super().requires_grad_(requires_grad)


class QuantizedHead(QuantizedStorage):
    """One or K quantised linear heads: weight, weight_scale, and a bias in the dtype of the hidden
    states. It cannot be trained.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.hold(weight, scale, dtype)
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True), False)
        )
