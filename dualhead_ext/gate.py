# SPDX-License-Identifier: Apache-2.0
"""The gates: modules that turn hidden states into the logit of alpha. A new gate is one class and a
line in GATES.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DualHeadConfig
from .prompt_projection import PromptProjection
from .reference import accumulator_dtype, fold_values, masked_softmax

# Queries attended to at once in `attend`: bounds its score matrix to B * H * 256 * S numbers.
_QUERY_BLOCK = 256


def linear(hidden: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(hidden)`` with the weights cast to the dtype of ``hidden``: trained weights are kept
    in fp32 beside a backbone in bf16. Autocast, where enabled, does this itself.
    """
    if layer.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return layer(hidden)
    bias = None if layer.bias is None else layer.bias.to(hidden.dtype)
    return F.linear(hidden, layer.weight.to(hidden.dtype), bias)


class AttentionGate(nn.Module):
    """The context-aware gate: ``logit_t = w_g.W_O Concat_i
    softmax_{s<=t}(q_{t,i}.k_{s,i}/sqrt(d_k)) v_{s,i} + b_g``.

    Causal; 3 d g + g^2 + g + 1 parameters. Starts at w_g = 0, b_g = 0: alpha = 1/2 everywhere.
    """

    has_state = True

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        d, g = config.hidden_size, config.gate_size
        self.num_heads, self.head_dim = config.gate_num_heads, config.gate_head_dim
        self.q_proj = nn.Linear(d, g, bias=False)
        self.k_proj = nn.Linear(d, g, bias=False)
        self.v_proj = nn.Linear(d, g, bias=False)
        self.o_proj = nn.Linear(g, g, bias=False)
        self.out = nn.Linear(g, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(
            1, 2
        )  # (B, H, T, d_k)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Gate logits of a whole sequence: hidden (B, T, d), attention_mask (B, T) -> (B, T) fp32
        (float64 for float64). A position that sees no real token, itself included, gets b_g.
        """
        q, k, v = (
            self._split(linear(hidden, layer)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if attention_mask is None:
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            length = hidden.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            valid = attention_mask.bool()[:, None, :]  # (B, 1, T)
            visible = causal & valid[:, :, None]  # (B, 1, T, T)
            # Weights of 0 do not hide the NaN that some backbones leave where a row sees nothing.
            k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))
            seen = visible.any(-1, keepdim=True)
            # Attention over nothing is NaN in some backends, backward too: let such rows see all,
            # then drop them.
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~seen)
            context = context.masked_fill(~seen, 0.0)
        context = linear(context.transpose(1, 2).flatten(2), self.o_proj)
        accumulate = accumulator_dtype(context.dtype)
        # w_g.a_t in the accumulator's dtype: a rounded logit would move alpha by more than the
        # products do.
        with torch.autocast(hidden.device.type, enabled=False):
            logit = F.linear(
                context.to(accumulate), self.out.weight.to(accumulate), self.out.bias.to(accumulate)
            )
        return logit.squeeze(-1)

    def folded_values(self) -> Tensor:
        """The folded value rows U (H, d), fp32 or float64: see
        :func:`dualhead_ext.reference.fold_values`.
        """
        return fold_values(
            self.v_proj.weight, self.o_proj.weight, self.out.weight, self.num_heads
        ).detach()

    def keys_and_values(
        self, hidden: Tensor, u_weight: Tensor, projection: PromptProjection | None
    ) -> tuple[Tensor, Tensor]:
        """What the cache keeps of hidden (B, T, d): k (B, H, T, d_k) in its dtype, u (B, H, T) fp32
        or float64. projection: what makes both at once, where there is one.
        """
        if projection is not None:
            k, u = projection(hidden)
        else:
            k = linear(hidden, self.k_proj)
            u = F.linear(hidden.to(u_weight.dtype), u_weight)
        return self._split(k), u.transpose(1, 2)

    def attend(
        self, hidden: Tensor, columns: Tensor, k: Tensor, u: Tensor, valid: Tensor
    ) -> Tensor:
        """Gate logits of chosen positions over a cache.

        hidden (B, N, d) with their cache columns (B, N); k (B, H, S, d_k), u (B, H, S), valid (B,
        S) -> (B, N).
        """
        accumulate = accumulator_dtype(hidden.dtype)
        keys, index = k.to(accumulate).transpose(-1, -2), torch.arange(k.shape[2], device=k.device)
        bias, logits = self.out.bias.to(accumulate), []
        for queries, column in zip(
            hidden.split(_QUERY_BLOCK, 1), columns.split(_QUERY_BLOCK, 1), strict=True
        ):
            q = self._split(linear(queries, self.q_proj)).to(accumulate)
            visible = (index <= column[..., None]) & valid[:, None, :]  # (B, N, S)
            weights = masked_softmax(q @ keys / math.sqrt(self.head_dim), visible[:, None])
            logits.append((weights @ u.to(accumulate)[..., None]).squeeze(-1).sum(1) + bias)
        return torch.cat(logits, dim=1)


class LinearGate(nn.Module):
    """The control without attention: ``logit_t = w.h_t + b``; d + 1 parameters, zero at first."""

    has_state = False

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden (..., d) -> (...) fp32 or float64. The mask has nothing to hide from it."""
        accumulate = accumulator_dtype(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            logit = F.linear(
                hidden.to(accumulate), self.out.weight.to(accumulate), self.out.bias.to(accumulate)
            )
        return logit.squeeze(-1)


class FixedGate(nn.Module):
    """alpha = ``config.gate_alpha`` for every token: the logit is log(a / (1 - a)), -inf at 0 and
    +inf at 1.
    """

    has_state = False

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        self.alpha = config.gate_alpha

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden (..., d) -> (...) fp32 or float64, constant."""
        dtype = accumulator_dtype(hidden.dtype)
        alpha = torch.full(hidden.shape[:-1], self.alpha, dtype=dtype, device=hidden.device)
        return torch.logit(alpha)


GATES: dict[str, type[nn.Module]] = {
    "attention": AttentionGate,
    "linear": LinearGate,
    "fixed": FixedGate,
}
