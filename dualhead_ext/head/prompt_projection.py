# SPDX-License-Identifier: Apache-2.0
"""Keys and folded values of a prompt from one GEMM, on devices whose GEMMs of 16-bit operands
return fp32 (CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

TERMS = 3  # of 8 (bfloat16) or 11 (float16) bits each: enough for the 24 bits of an fp32 number


class PromptProjection:
    """``[W_K; U]`` as one matrix, (g + 3H, d) in the dtype of W_K (g, d). Each fp32 row of U (H, d)
    is split into three 16-bit rows, so it is not rounded, and hidden states need no fp32 copy.

    The smallest float16 number is 2^-24. So float16 rows are scaled by a power of two that brings
    their largest entry into [2^14, 2^15); the loss is below 2^-39 of that entry.
    """

    def __init__(self, k_weight: Tensor, u_weight: Tensor) -> None:
        """k_weight (g, d) float16 or bfloat16, u_weight (H, d) fp32."""
        _, exponent = torch.frexp(u_weight.abs().amax(1, keepdim=True))
        shift = 15 if k_weight.dtype == torch.float16 else 0
        one = torch.ones_like(exponent, dtype=u_weight.dtype)
        self.unit = torch.ldexp(one, (exponent - shift).clamp(min=-100)).squeeze(1)  # (H,)
        rest, rows = u_weight / self.unit[:, None], [k_weight]
        for _ in range(TERMS):
            rows.append(rest.to(k_weight.dtype))
            rest = rest - rows[-1].to(rest.dtype)
        self.weight = torch.cat(rows)
        self._keys = len(k_weight)

    @staticmethod
    def applies(k_weight: Tensor) -> bool:
        """Whether such a GEMM exists for this device and dtype."""
        return k_weight.is_cuda and k_weight.dtype in (torch.float16, torch.bfloat16)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (..., d) -> keys (..., g) in its dtype, folded values (..., H) fp32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = torch.mm(flat, self.weight.T, out_dtype=torch.float32)
        k, u = out[:, : self._keys].to(hidden.dtype), out[:, self._keys :]
        u = u.unflatten(-1, (TERMS, -1)).flip(-2).sum(-2) * self.unit  # smallest first
        return k.unflatten(0, hidden.shape[:-1]), u.unflatten(0, hidden.shape[:-1])
