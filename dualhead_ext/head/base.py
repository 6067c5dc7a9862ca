# SPDX-License-Identifier: Apache-2.0
"""Two heads, a gate and their mixture over whole sequences; decoding is added in `head_decode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..config import DualHeadConfig
from ..quantization import format_of
from ..reference import accumulator_dtype
from .controls import dense, objective_rows, per_row
from .gate import GATES
from .kl_cap import capped_alpha
from .reward_head import RewardHead, make_reward_head


@dataclass
class DualHeadOutput:
    """Of a full pass or a prefill: logits (B, T, V); alpha and gate_logit (B, T); fp32 (float64 for
    float64).
    """

    logits: Tensor
    alpha: Tensor
    gate_logit: Tensor


@dataclass
class StepOutput:
    """Of one decode step; see :meth:`GatedHead.step`."""

    logits: Tensor | None
    alpha: Tensor
    gate_logit: Tensor
    token: Tensor
    logprob: Tensor
    status: Tensor
    attention: Tensor | None


class HeadBase(nn.Module):
    """Gate, reward head and mixture. Subclasses give `lm_weight` and `lm_bias`."""

    config: DualHeadConfig
    reward_head: RewardHead
    gate: nn.Module

    def _add_gate_and_reward_head(self, config: DualHeadConfig) -> None:
        self.config = config
        self.reward_head = make_reward_head(config)
        self.gate = GATES[config.gate](config)

    @property
    def lm_weight(self) -> Tensor:
        """W_LM, (V, d)."""
        raise NotImplementedError(f"{type(self).__name__} must define lm_weight")

    @property
    def lm_bias(self) -> Tensor | None:
        """b_LM, (V,), or None."""
        raise NotImplementedError(f"{type(self).__name__} must define lm_bias")

    @property
    def lm_scale(self) -> Tensor | None:
        """The quantised LM head's scales; None while it is not quantised."""
        return None

    @property
    def reward_scale(self) -> Tensor | None:
        """The quantised "full" reward head's scales, (K, V) or (K, V, d/128), or None."""
        return getattr(self.reward_head, "weight_scale", None)

    @property
    def quantized(self) -> str | None:
        """The heads' format, a name of :data:`dualhead_ext.quantization.FORMATS`, or None."""
        return None if self.lm_scale is None else format_of(self.lm_weight)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The dtype of hidden states: the LM head's, or what it was before it was quantised."""
        return self.lm_weight.dtype

    # --- whole sequences ---

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        strength: float | Tensor | None = None,
        gate_offset: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        objective_weights: Tensor | None = None,
        max_kl: float | Tensor | None = None,
        skip_threshold: float | Tensor | None = None,
    ) -> DualHeadOutput:
        """Logits of every position: ``z_t = (1-a_t) z_LM,t + a_t z_RM,t`` and their like for
        ``mix="probs"``.

        Differentiable and causal. Source: the paper, Methodology.

        Args:
            hidden: (B, T, d), in the LM head's dtype.
            attention_mask: (B, T), nonzero = real token; left, right or ragged padding. Default:
                all real.
            strength: s >= 0 scales alpha, ``a <- s a``, in the probability mix at most 1; 0 gives
                z_LM itself. A number or (B,).
            gate_offset: added to the gate's logit. A number or (B,).
            alpha: replaces the gate's value, in [0, 1]. A number or (B,).
            objective_weights: (K,) or (B, K); default 1/K each.
            max_kl: lowers alpha until ``KL(pi_mix || pi_LM) <= max_kl`` nats at each token
                (:func:`dualhead_ext.head.kl_cap.capped_alpha`); >= 0. A number or (B,). Default:
                no cap.
            skip_threshold: alpha below it counts as 0, alpha nearer to 1 than it as 1, before
                ``max_kl``; in [0, 0.5], default 0. A number or (B,). What it saves, and the bounds
                on the error: docs/generation.md.
        Raises:
            ValueError: wrong shapes or values. TypeError: wrong dtypes.
        """
        self._check_hidden("DualHead.forward", hidden, 3)
        self._check_mask("DualHead.forward", attention_mask, hidden, hidden.shape[1])
        gate_logit = self.gate(hidden, attention_mask)
        return self._mixed(
            "DualHead.forward",
            hidden,
            gate_logit,
            strength,
            gate_offset,
            alpha,
            objective_weights,
            max_kl,
            skip_threshold,
        )

    def _mixed(
        self,
        operator: str,
        hidden: Tensor,
        gate_logit: Tensor,
        strength: Any,
        gate_offset: Any,
        alpha: Any,
        objective_weights: Any,
        max_kl: Any = None,
        skip_threshold: Any = None,
        post_process: bool = True,
    ) -> DualHeadOutput:
        """Both heads and their mixture at positions whose gate logits are known: hidden (B, N, d),
        gate_logit (B, N).

        ``post_process=False`` leaves out the backbone's own f, for a backbone that applies it
        itself (logits mix only).
        """
        batch, dtype, device = hidden.shape[0], gate_logit.dtype, hidden.device
        rows = {
            name: per_row(operator, name, value, batch, dtype, device)
            for name, value in (
                ("strength", strength),
                ("gate_offset", gate_offset),
                ("alpha", alpha),
                ("skip_threshold", skip_threshold),
            )
        }
        rows = {name: None if row is None else row[:, None] for name, row in rows.items()}
        weights = objective_rows(
            operator, objective_weights, batch, self.config.num_objectives, dtype, device
        )
        if rows["gate_offset"] is not None:
            gate_logit = gate_logit + rows["gate_offset"]
        mix = self.config.mix
        a = reference.mixing_weight(
            gate_logit, rows["alpha"], rows["strength"], rows["skip_threshold"], mix
        )
        limit_alpha = self._alpha_limit(operator, max_kl, batch, dtype, device)
        post = (self.config.logit_scale, self.config.logit_softcap) if post_process else (1.0, 0.0)
        if self.reward_head.kind == "embedding" and mix == "logits" and limit_alpha is None:
            moved = reference.move_hidden(hidden, self._correction(hidden, weights), a)
            logits = reference.postprocess(self._lm_logits(moved), *post)
            return DualHeadOutput(logits, a, gate_logit)
        z_lm = self._lm_logits(hidden)
        z_rm = self.reward_logits(hidden, z_lm, weights)
        if limit_alpha is not None:
            a = limit_alpha(z_lm, z_rm, a)
        return DualHeadOutput(reference.mix_logits(z_lm, z_rm, a, mix, *post), a, gate_logit)

    def _lm_logits(self, hidden: Tensor, bias: bool = True) -> Tensor:
        """z_LM of (..., d), before f; ``bias=False`` leaves b_LM out."""
        lm = (self.lm_weight, self.lm_bias if bias else None)
        if self.lm_scale is None:
            lm = self._cast(hidden, *lm)
        return reference.head_logits(hidden, *lm, self.lm_scale)

    def _correction(self, hidden: Tensor, weights: Tensor | None) -> Tensor:
        """:func:`reference.correction` by the reward head's own maps."""
        head = self.reward_head
        maps = [None if w is None else self._cast(hidden, w, None)[0] for w in head.maps]
        return reference.correction(hidden, *maps, head.bias, weights)

    def reward_logits(self, hidden: Tensor, z_lm: Tensor, weights: Tensor | None) -> Tensor:
        """z_RM (B, ..., V) before f, of hidden (B, ..., d) at objective weights (B, K) or None.
        ``z_lm`` is what a reward head that is a correction is added to.
        """
        head = self.reward_head
        if head.kind == "full":
            reward = (head.weight, head.bias)
            if self.reward_scale is None:
                reward = self._cast(hidden, *reward)
            return reference.reward_logits(hidden, *reward, weights, self.reward_scale)
        change = self._correction(hidden, weights)
        if head.kind == "embedding":
            change = self._lm_logits(change.to(hidden.dtype), bias=False)
        return z_lm + change

    def _alpha_limit(
        self, operator: str, max_kl: Any, batch: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """(z_LM, z_RM, alpha) -> alpha within ``max_kl``; None without a cap. The backbone's f
        counts even where it is left to the backbone.
        """
        row = per_row(operator, "max_kl", max_kl, batch, dtype, device)
        if row is None:
            return None
        return partial(
            capped_alpha,
            max_kl=row,
            mix=self.config.mix,
            logit_scale=self.config.logit_scale,
            logit_softcap=self.config.logit_softcap,
        )

    @staticmethod
    def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights in the dtype of ``hidden`` (heads train in fp32 beside a bf16 backbone); autocast
        does this itself.
        """
        if weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
            return weight, bias
        return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)

    # --- checks ---

    def _check_hidden(self, operator: str, hidden: Tensor, dim: int) -> None:
        shape = (
            f"(B, T, {self.config.hidden_size})" if dim == 3 else f"(B, {self.config.hidden_size})"
        )
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"{operator}: hidden must be a tensor {shape}, got {type(hidden).__name__}"
            )
        dense(operator, "hidden", hidden)
        if hidden.dim() != dim or hidden.shape[-1] != self.config.hidden_size or 0 in hidden.shape:
            raise ValueError(
                f"{operator}: hidden must be {shape} and not empty, got {tuple(hidden.shape)}"
            )
        weight = self.lm_weight
        if hidden.device != weight.device:
            raise ValueError(
                f"{operator}: hidden must be on {weight.device}, "
                f"as the LM head, got {hidden.device}"
            )
        dtype = self.hidden_dtype
        if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{operator}: hidden must be {dtype}, as the LM head, got {hidden.dtype}"
            )

    @staticmethod
    def _check_mask(operator: str, mask: Tensor | None, hidden: Tensor, length: int) -> None:
        if mask is None:
            return
        dense(operator, "attention_mask", mask, hidden.device)
        expected = (hidden.shape[0], length)
        if mask.shape != expected:
            raise ValueError(
                f"{operator}: attention_mask must be {expected}, got {tuple(mask.shape)}"
            )

    def _check_controls(
        self,
        operator: str,
        batch: int,
        device: torch.device,
        objective_weights: Any,
        **numbers: Any,
    ) -> None:
        dtype = accumulator_dtype(self.hidden_dtype)
        for name, value in numbers.items():
            per_row(operator, name, value, batch, dtype, device)
        objective_rows(
            operator, objective_weights, batch, self.config.num_objectives, dtype, device
        )
