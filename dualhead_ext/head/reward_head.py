# SPDX-License-Identifier: Apache-2.0
"""The reward heads: K matrices of the LM head's size, or K corrections of the LM head.

A new kind is a class here, a name in `config.REWARD_HEAD_NAMES`, and its formula in `mixture` and
in `reference`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..config import DualHeadConfig
from ..quantization.quantized_head import QuantizedHead
from .mixture import token_rewards


class FullRewardHead(nn.Module):
    """``reward_head="full"``: K linear heads, weight (K, V, d), bias (K, V) or None."""

    kind: Literal["full"] = "full"

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        k, v, d = config.num_objectives, config.vocab_size, config.hidden_size
        self.weight = nn.Parameter(torch.empty(k, v, d))
        self.bias = nn.Parameter(torch.zeros(k, v)) if config.bias else None

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy the LM head into every objective: weight (V, d), bias (V,). Never tied."""
        self.weight.copy_(weight.expand_as(self.weight))
        if self.bias is not None:
            self.bias.copy_(bias.expand_as(self.bias))

    @torch.no_grad()
    def resize(self, weight: Tensor, bias: Tensor | None) -> None:
        """Resize to the vocabulary of an LM head, weight (V', d), bias (V',). Old rows are kept;
        new rows are copied from the LM head.
        """
        kept = min(self.weight.shape[1], len(weight))
        rows = {"weight": weight} | ({} if self.bias is None else {"bias": bias})
        for name, value in rows.items():
            old = getattr(self, name)
            new = value.to(old).expand(len(old), *value.shape).clone()
            new[:, :kept] = old[:, :kept]
            setattr(self, name, nn.Parameter(new, old.requires_grad))

    def tensors(self) -> dict[str, Any]:
        """The head as keyword arguments of :func:`dualhead_ext.functional.dual_head_loss` and
        :func:`dualhead_ext.head.mixture.token_rewards`.
        """
        return {"reward_weight": self.weight, "reward_bias": self.bias}

    def token_rewards(
        self, hidden: Tensor, labels: Tensor, lm_weight: Tensor, lm_bias: Tensor | None = None
    ) -> Tensor:
        """delta at the labels, (K, ...): :func:`dualhead_ext.head.mixture.token_rewards`."""
        return token_rewards(hidden, labels, lm_weight, lm_bias, **self.tensors())


class QuantizedRewardHead(QuantizedHead):
    """A full reward head in a format of :mod:`dualhead_ext.quantization`."""

    kind: Literal["full"] = "full"

    def tensors(self) -> dict[str, Any]:
        """As :meth:`FullRewardHead.tensors`."""
        return {"reward_weight": self.weight, "reward_bias": self.bias}

    def start_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises RuntimeError: quantised heads cannot be initialised."""
        raise RuntimeError("QuantizedRewardHead: quantised heads cannot start from an LM head")

    def resize(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises RuntimeError: quantised heads keep their vocabulary."""
        raise RuntimeError("QuantizedRewardHead: quantised heads cannot be resized")


class _Maps(nn.Module):
    """K linear maps without a bias: weight (K, n, m)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class CorrectionRewardHead(nn.Module):
    """``reward_head="embedding"`` or ``"lowrank"``: z_RM = z_LM + sum_k w_k delta_k, with
    delta_k = W_LM (U_k D_k h + c_k) or delta_k = U_k D_k h + c_k.

    state_dict: down.weight (K, r, d), up.weight (K, n, r), bias (K, n), with n = d for
    "embedding" and n = V for "lowrank". Rank 0 has neither down nor up. ``down`` starts random,
    ``up`` and bias at zero: delta = 0.
    """

    kind: Literal["embedding", "lowrank"]

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        k, r, d = config.num_objectives, config.reward_rank, config.hidden_size
        self.kind = cast(Literal["embedding", "lowrank"], config.reward_head)
        n = d if self.kind == "embedding" else config.vocab_size
        self.down = self.up = None
        if r > 0:
            self.down, self.up = _Maps(k, r, d), _Maps(k, n, r)
            # As LoRA initialises its A.
            nn.init.uniform_(self.down.weight, -1 / math.sqrt(d), 1 / math.sqrt(d))
        self.bias = nn.Parameter(torch.zeros(k, n))

    def start_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Does nothing: a correction starts at zero."""

    @torch.no_grad()
    def resize(self, weight: Tensor, bias: Tensor | None) -> None:
        """Resize to the vocabulary of an LM head, weight (V', d). delta of new tokens follows from
        W_LM ("embedding"), or starts at zero ("lowrank").
        """
        if self.kind == "embedding":
            return
        for module, name in ((self.up, "weight"), (self, "bias")):
            old = getattr(module, name)
            new = old.new_zeros(len(old), len(weight), *old.shape[2:])
            kept = min(old.shape[1], len(weight))
            new[:, :kept] = old[:, :kept]
            setattr(module, name, nn.Parameter(new, old.requires_grad))

    @property
    def maps(self) -> tuple[Tensor | None, Tensor | None]:
        """(D (K, r, d), U (K, n, r)); (None, None) for rank 0."""
        return (None, None) if self.down is None else (self.down.weight, self.up.weight)

    def tensors(self) -> dict[str, Any]:
        """As :meth:`FullRewardHead.tensors`; for rank 0, reward_down and reward_up are None."""
        down, up = self.maps
        return {
            "reward_head": self.kind,
            "reward_down": down,
            "reward_up": up,
            "reward_bias": self.bias,
        }

    def token_rewards(
        self, hidden: Tensor, labels: Tensor, lm_weight: Tensor, lm_bias: Tensor | None = None
    ) -> Tensor:
        """As :meth:`FullRewardHead.token_rewards`."""
        return token_rewards(hidden, labels, lm_weight, lm_bias, **self.tensors())


RewardHead = FullRewardHead | CorrectionRewardHead | QuantizedRewardHead


def make_reward_head(config: DualHeadConfig) -> RewardHead:
    """A new reward head of the kind ``config.reward_head``, at its initial values."""
    return FullRewardHead(config) if config.reward_head == "full" else CorrectionRewardHead(config)
