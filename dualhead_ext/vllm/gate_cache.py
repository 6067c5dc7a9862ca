# SPDX-License-Identifier: Apache-2.0
"""The attention gate's state in vLLM's paged cache, as one more attention layer, so that paging,
shared prefixes, chunked prefill and preemption apply to it as to the backbone's state.

A position's state is H keys of d_k numbers, and H folded values u (:mod:`dualhead_ext.head.gate`).
Several gate heads share one of the layer's key heads: their keys are concatenated, and a query is
zero outside its own part. u is in the value's first columns, each as a sum of two numbers of the
cache's dtype, so that a 16-bit cache keeps at least 16 bits of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform


def head_sizes() -> tuple[int, ...]:
    """Head sizes that this platform's attention supports."""
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return tuple(CPUAttentionBackend.get_supported_head_sizes())
    return (64, 128, 256)  # supported by every GPU backend


def packing(num_heads: int, head_dim: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(gate heads per key head, size of the key head) that use the least cache.

    Raises:
        ValueError: a gate head is larger than any size.
    """
    best = None
    for group in range(1, num_heads + 1):
        fitting = [size for size in sizes if size >= max(group * head_dim, 2 * group)]
        if fitting and (best is None or -(-num_heads // group) * min(fitting) < best[0]):
            best = (-(-num_heads // group) * min(fitting), group, min(fitting))
    if best is None:
        raise ValueError(
            f"vLLM: gate_head_dim must be at most {max(sizes)}, which its attention takes, got "
            f"{head_dim}"
        )
    return best[1:]


class GateAttention(nn.Module):
    """Attention of the gate's H heads over all positions of each request.

    Args:
        name: name of the layer and of its cache.
    """

    def __init__(self, num_heads: int, head_dim: int, name: str) -> None:
        super().__init__()
        self._heads, self._dim = num_heads, head_dim
        self._group, self._size = packing(num_heads, head_dim, head_sizes())
        self._keys = -(-num_heads // self._group)
        # No cache_config: an fp8 cache or the model's sliding window must not apply to the gate.
        self.attention = Attention(
            self._keys * self._group,
            self._size,
            head_dim**-0.5,
            num_kv_heads=self._keys,
            prefix=name,
        )

    def forward(self, q: Tensor, k: Tensor, u: Tensor) -> Tensor:
        """q, k (T, H, d_k) in the model's dtype, u (T, H) fp32 -> sum of the heads' results (T,),
        fp32.
        """
        count, own = len(q), slice(0, self._heads)
        shape = (count, self._keys, self._group)
        query = q.new_zeros(count, self._keys, self._group, self._size)
        key = q.new_zeros(count, self._keys, self._size)
        value = torch.zeros_like(key)
        parts = k.new_zeros(count, self._keys * self._group, self._dim)
        parts[:, own] = k
        key[..., : self._group * self._dim] = parts.view(count, self._keys, -1)
        parts = torch.zeros_like(parts)
        parts[:, own] = q
        parts = parts.view(*shape, self._dim)
        numbers = u.new_zeros(count, self._keys * self._group)
        numbers[:, own] = u
        high = numbers.to(value.dtype)
        low = (numbers - high.to(numbers.dtype)).to(value.dtype)
        value[..., : 2 * self._group] = torch.stack([high, low], -1).view(count, self._keys, -1)
        for i in range(self._group):
            query[:, :, i, i * self._dim : (i + 1) * self._dim] = parts[:, :, i]
        out = self.attention(query.flatten(1), key.flatten(1), value.flatten(1))
        out = out.view(*shape, self._size)
        each = [out[:, :, i, 2 * i : 2 * i + 2].float().sum(-1) for i in range(self._group)]
        return torch.stack(each, -1).flatten(1)[:, own].sum(-1)
