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
        group, size = packing(num_heads, head_dim, head_sizes())
        keys = -(-num_heads // group)
        # No cache_config: an fp8 cache or the model's sliding window must not apply to the gate.
        self.attention = Attention(
            keys * group, size, head_dim**-0.5, num_kv_heads=keys, prefix=name
        )
        # Where each number of query, key and value comes from: a column of (q, k, both parts of u,
        # 0). One gather then does what would take dozens of small operations in each step.
        count = num_heads * head_dim
        q, k = torch.arange(2 * count).view(2, num_heads, head_dim)
        high, low = 2 * count + torch.arange(2 * num_heads).view(2, num_heads)
        zero = 2 * count + 2 * num_heads
        query = torch.full((keys * group, size), zero)
        key, value = torch.full((2, keys, size), zero)
        results = torch.empty(num_heads, 2, dtype=torch.int64)
        for head in range(num_heads):
            place, i = divmod(head, group)
            own = slice(i * head_dim, (i + 1) * head_dim)
            query[head, own], key[place, own] = q[head], k[head]
            value[place, 2 * i], value[place, 2 * i + 1] = high[head], low[head]
            results[head] = head * size + 2 * i + torch.arange(2)
        columns = [part.flatten() for part in (query, key, value)]
        self._widths = [len(part) for part in columns]
        self.register_buffer("_columns", torch.cat(columns), persistent=False)
        self.register_buffer("_results", results.flatten(), persistent=False)

    def forward(self, qk: Tensor, u: Tensor) -> Tensor:
        """qk (T, 2 H d_k) in the model's dtype, all queries and then all keys; u (T, H) fp32 -> sum
        of the heads' results (T,), fp32.
        """
        high = u.to(qk.dtype)
        low = (u - high).to(qk.dtype)
        numbers = torch.cat([qk, high, low, qk.new_zeros(len(qk), 1)], 1)
        parts = numbers.index_select(1, self._columns).split(self._widths, 1)
        out = self.attention(*(part.contiguous() for part in parts))
        return out.index_select(1, self._results).sum(1, dtype=torch.float32)
