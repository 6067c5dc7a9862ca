# SPDX-License-Identifier: Apache-2.0
"""The gates: modules that map hidden states to the logit of alpha. A new gate is a class and an
entry in GATES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GATE_NAMES, DualHeadConfig
from ..ops.logits import accumulator_dtype
from .prompt_projection import PromptProjection

# Queries per block in `attend`: limits its score matrix to (B, H, 256, S).
_QUERY_BLOCK = 256


def linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` with the weight cast to the dtype of ``hidden``, since trained weights
    are fp32 beside a bf16 backbone. Under autocast nothing is cast here.
    """
    if weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden, weight)
    return F.linear(hidden, weight.to(hidden.dtype))


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension where ``visible``. A row without visible entries is all zero,
    never NaN.
    """
    weights = scores.masked_fill(~visible, -torch.inf)
    seen = visible.any(-1, keepdim=True)
    # Such rows get finite scores first: the softmax of a row of -inf is NaN, also in backward.
    return torch.softmax(weights.masked_fill(~seen, 0.0), dim=-1).masked_fill(~visible, 0.0)


class Gate(nn.Module):
    """The base class of gates. A gate owns its parameters itself, without ``nn.Linear`` children.

    Tools that replace linear layers (PEFT's default target names and "all-linear", torchao) would
    mistake children named q_proj to o_proj for the backbone's. Training would then use the
    replacement, and decoding the plain weights. In a state dict each parameter has its name in
    files: ``gate.q_proj.weight`` for ``gate.q_weight``.

    ``forward(hidden, attention_mask=None)`` maps hidden states (..., d) to the logit of alpha
    (...), fp32 or float64. A gate with ``has_state`` keeps a cache while decoding.
    """

    has_state = False
    num_heads: int  # for gates with state, like the next three
    head_dim: int
    keys_and_values: Callable[..., tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    state_names: ClassVar[dict[str, str]] = {}  # parameter -> its name in a state dict

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        own: dict[str, Tensor] = {}
        super()._save_to_state_dict(own, "", keep_vars)
        for name, value in own.items():
            destination[prefix + self.state_names[name]] = value

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {prefix + there: prefix + here for here, there in self.state_names.items()}
        renamed = {names.get(key, key): value for key, value in state_dict.items()}
        missing: list[str] = []
        super()._load_from_state_dict(
            renamed, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        back = {here: there for there, here in names.items()}
        missing_keys += [back.get(key, key) for key in missing]


class AttentionGate(Gate):
    """The paper's gate: ``logit_t = w_g.W_O Concat_i softmax_{s<=t}(q_{t,i}.k_{s,i}/sqrt(d_k))
    v_{s,i} + b_g``.

    Causal, with 3 d g + g^2 + g + 1 parameters. It starts at w_g = 0, b_g = 0: alpha = 1/2.
    """

    has_state = True
    state_names: ClassVar[dict[str, str]] = {
        "q_weight": "q_proj.weight",
        "k_weight": "k_proj.weight",
        "v_weight": "v_proj.weight",
        "o_weight": "o_proj.weight",
        "out_weight": "out.weight",
        "out_bias": "out.bias",
    }

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        d, g = config.hidden_size, config.gate_size
        self.num_heads, self.head_dim = config.gate_num_heads, config.gate_head_dim
        self.q_weight = nn.Parameter(torch.empty(g, d))
        self.k_weight = nn.Parameter(torch.empty(g, d))
        self.v_weight = nn.Parameter(torch.empty(g, d))
        self.o_weight = nn.Parameter(torch.empty(g, g))
        for weight in (self.q_weight, self.k_weight, self.v_weight, self.o_weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Linear starts
        self.out_weight = nn.Parameter(torch.zeros(1, g))
        self.out_bias = nn.Parameter(torch.zeros(1))

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(
            1, 2
        )  # (B, H, T, d_k)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Gate logits of whole sequences: hidden (B, T, d), attention_mask (B, T) -> (B, T) fp32
        (float64 for float64). A position with no real token up to and including itself gets b_g.
        """
        q, k, v = (
            self._split(linear(hidden, weight))
            for weight in (self.q_weight, self.k_weight, self.v_weight)
        )
        if attention_mask is None:
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            length = hidden.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
            valid = attention_mask.bool()[:, None, :]  # (B, 1, T)
            visible = causal & valid[:, :, None]  # (B, 1, T, T)
            # An attention weight of 0 does not hide the NaN that some backbones leave at padding.
            k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))
            seen = visible.any(-1, keepdim=True)
            # Attention over nothing is NaN in some backends, also in backward. So such rows attend
            # to everything, and the result is dropped.
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | ~seen)
            context = context.masked_fill(~seen, 0.0)
        context = linear(context.transpose(1, 2).flatten(2), self.o_weight)
        accumulate = accumulator_dtype(context.dtype)
        # w_g.a_t in the accumulator's dtype: rounding the logit would change alpha more than the
        # rounding of the products does.
        with torch.autocast(hidden.device.type, enabled=False):
            logit = F.linear(
                context.to(accumulate), self.out_weight.to(accumulate), self.out_bias.to(accumulate)
            )
        return logit.squeeze(-1)

    def folded_values(self) -> Tensor:
        """The folded value rows U (H, d), fp32 or float64: ``U_i = W_V,i^T c_i``, c = W_O^T w_g.
        Of the value at a past position the gate needs only ``u_{s,i} = U_i.h_s``.
        """
        dtype = accumulator_dtype(self.v_weight.dtype)
        o, v, out = (w.detach().to(dtype) for w in (self.o_weight, self.v_weight, self.out_weight))
        c, heads = (out @ o).view(self.num_heads, -1), v.unflatten(0, (self.num_heads, -1))
        return torch.einsum("hk,hkd->hd", c, heads)

    def keys_and_values(
        self, hidden: Tensor, u_weight: Tensor, projection: PromptProjection | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and folded values of hidden (B, T, d) for the cache: k (B, H, T, d_k) in its dtype,
        u (B, H, T) fp32 or float64. projection: computes both in one GEMM, if the device has it.
        """
        if projection is not None:
            k, u = projection(hidden)
        else:
            k = linear(hidden, self.k_weight)
            u = F.linear(hidden.to(u_weight.dtype), u_weight)
        return self._split(k), u.transpose(1, 2)

    def attend(
        self, hidden: Tensor, columns: Tensor, k: Tensor, u: Tensor, valid: Tensor
    ) -> Tensor:
        """Gate logits (B, N) of some positions over a cache: hidden (B, N, d) at cache columns
        (B, N); k (B, H, S, d_k), u (B, H, S), valid (B, S).
        """
        accumulate = accumulator_dtype(hidden.dtype)
        keys, index = k.to(accumulate).transpose(-1, -2), torch.arange(k.shape[2], device=k.device)
        bias, logits = self.out_bias.to(accumulate), []
        for queries, column in zip(
            hidden.split(_QUERY_BLOCK, 1), columns.split(_QUERY_BLOCK, 1), strict=True
        ):
            q = self._split(linear(queries, self.q_weight)).to(accumulate)
            visible = (index <= column[..., None]) & valid[:, None, :]  # (B, N, S)
            weights = masked_softmax(q @ keys / math.sqrt(self.head_dim), visible[:, None])
            logits.append((weights @ u.to(accumulate)[..., None]).squeeze(-1).sum(1) + bias)
        return torch.cat(logits, dim=1)


class LinearGate(Gate):
    """A gate without attention: ``logit_t = w.h_t + b``; d + 1 parameters, which start at zero."""

    state_names: ClassVar[dict[str, str]] = {"out_weight": "out.weight", "out_bias": "out.bias"}

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        self.out_weight = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.out_bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden (..., d) -> (...), fp32 or float64. The mask is not needed."""
        accumulate = accumulator_dtype(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            # Not F.linear: its order of summation depends on the number of rows.
            products = hidden.to(accumulate) * self.out_weight[0].to(accumulate)
            return products.sum(-1) + self.out_bias.to(accumulate)


class FixedGate(Gate):
    """alpha = ``config.gate_alpha`` for every token: the logit is log(a / (1 - a)), -inf at 0 and
    +inf at 1.
    """

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        self.alpha = config.gate_alpha

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden (..., d) -> (...), fp32 or float64, constant."""
        dtype = accumulator_dtype(hidden.dtype)
        alpha = torch.full(hidden.shape[:-1], self.alpha, dtype=dtype, device=hidden.device)
        return torch.logit(alpha)


GATES: dict[str, type[Gate]] = {
    "attention": AttentionGate,
    "linear": LinearGate,
    "fixed": FixedGate,
}


def register_gate(name: str, gate: type[Gate]) -> None:
    """Register a gate of your own, so that ``DualHeadConfig(gate=name)`` finds it.

    Its ``__init__`` takes the config; its ``forward`` maps hidden states (..., d) to the logit of
    alpha (...), fp32 or float64. Its ``state_names`` map each parameter to its name in files.
    Each process must register the gate before it loads heads with it.

    Raises:
        TypeError: gate is not a class derived from `Gate`.
        ValueError: another gate has this name.
    """
    if not (isinstance(gate, type) and issubclass(gate, Gate)):
        raise TypeError(f"register_gate: gate must be a class derived from Gate, got {gate!r}")
    if GATES.get(name, gate) is not gate:
        raise ValueError(f"register_gate: name must be new, got {name!r}, which is taken")
    if name not in GATES:
        GATES[name] = gate
        GATE_NAMES.append(name)
