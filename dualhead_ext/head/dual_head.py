# SPDX-License-Identifier: Apache-2.0
"""The dual head: two linear heads and a gate on the hidden states of a backbone.

`GatedHead` is the base class. Its two subclasses differ in where the LM head's weight lives:
`DualHead` here owns an `nn.Linear`; `model.lm_head.DualHeadLMHead` is the backbone's own lm_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DualHeadConfig
from ..ops.logits import accumulator_dtype, postprocess
from ..quantization import calibration_factor, check_format, format_of, quantize_with, stand_ins
from ..quantization.quantized_head import QuantizedHead
from ..quantization.torchao_weights import check_lm_weight, is_torchao, quantized_weights_of
from . import decoding, mixture
from .cache import GateCache
from .controls import Controls, Sampling, refuse_others, takes
from .conversion import Compressed, compressed_state, concatenate, reward_linear
from .gate import GATES, Gate
from .reward_head import (
    CorrectionRewardHead,
    QuantizedRewardHead,
    RewardHead,
    make_reward_head,
)


@dataclass
class DualHeadOutput:
    """The result of a full pass or a prefill: logits (B, T, V), alpha and gate_logit (B, T), in
    fp32 (float64 for float64).
    """

    logits: Tensor
    alpha: Tensor
    gate_logit: Tensor


@dataclass
class StepOutput:
    """The result of one decode step; see :meth:`GatedHead.step`."""

    logits: Tensor | None
    alpha: Tensor
    gate_logit: Tensor
    token: Tensor
    logprob: Tensor
    status: Tensor
    attention: Tensor | None


class GatedHead(nn.Module):
    """Gate, reward head and mixture, for whole sequences and for decoding; and conversions to other
    forms of head. Subclasses provide the LM head: `lm_weight`, `lm_bias`, `lm_scale`.
    """

    config: DualHeadConfig
    reward_head: RewardHead
    gate: Gate

    def _add_gate_and_reward_head(self, config: DualHeadConfig) -> None:
        self.config = config
        self.reward_head = make_reward_head(config)
        self.gate = GATES[config.gate](config)

    @property
    def lm_weight(self) -> Tensor:
        """W_LM, (V, d)."""
        raise NotImplementedError(f"{type(self).__name__} must define lm_weight")

    @property
    def lm_bias(self) -> nn.Parameter | None:
        """b_LM, (V,), or None."""
        raise NotImplementedError(f"{type(self).__name__} must define lm_bias")

    @property
    def lm_scale(self) -> Tensor | None:
        """The quantised LM head's scales; None if it is not quantised."""
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
        """The dtype of hidden states: the LM head's dtype before any quantisation."""
        return self.lm_weight.dtype

    # --- whole sequences ---

    @takes(Controls)
    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, **arguments: Any
    ) -> DualHeadOutput:
        """Logits of every position: ``z_t = (1-a_t) z_LM,t + a_t z_RM,t``; with ``mix="probs"`` the
        log-probabilities ``log((1-a_t) softmax(z_LM,t) + a_t softmax(z_RM,t))``.

        Differentiable and causal. Source: the paper, Methodology and Analysis.

        Args:
            hidden: (B, T, d), in the LM head's dtype.
            attention_mask: (B, T), nonzero = real token; left, right or ragged padding. Default:
                no padding.
            arguments: the fields of :class:`dualhead_ext.head.controls.Controls`.
        Returns:
            logits (B, T, V), alpha and gate_logit (B, T), in fp32 (float64 for float64).
        Raises:
            ValueError: wrong shapes or values. TypeError: wrong dtypes, or an unknown argument.
        """
        operator = "DualHead.forward"
        controls = Controls.take(arguments)
        refuse_others(operator, arguments)
        decoding.check_hidden(self, operator, hidden, 3)
        decoding.check_mask(operator, attention_mask, hidden, hidden.shape[1])
        gate_logit = self.gate(hidden, attention_mask)
        return self.mixed(hidden, gate_logit, self.control_rows(operator, controls, hidden))

    def control_rows(
        self, operator: str, controls: Controls, hidden: Tensor, cache: GateCache | None = None
    ) -> Controls:
        """Controls as one row for each request of hidden (B, ..., d). cache: reuses the tensors
        that it has made of numbers.

        Raises:
            TypeError, ValueError: see :meth:`Controls.rows`.
        """
        fill = None if cache is None or torch.compiler.is_compiling() else cache.per_row
        dtype = accumulator_dtype(hidden.dtype)
        count = self.config.num_objectives
        return controls.rows(operator, hidden.shape[0], count, dtype, hidden.device, fill)

    def mixed(
        self, hidden: Tensor, gate_logit: Tensor, controls: Controls, post_process: bool = True
    ) -> DualHeadOutput:
        """Both heads and their mixture from given gate logits: hidden (B, N, d), gate_logit (B, N),
        controls as rows.

        ``post_process=False`` omits f, for a backbone that applies its f itself (logits mix only).
        """
        config, weights = self.config, controls.objective_weights
        gate_logit, a = mixture.mixing_weight(gate_logit, controls, config.mix)
        limit_alpha = decoding.alpha_limit(config, controls.max_kl)
        post = (config.logit_scale, config.logit_softcap) if post_process else (1.0, 0.0)
        head = self.reward_head
        if head.kind == "embedding" and config.mix == "logits" and limit_alpha is None:
            moved = mixture.move_hidden(hidden, self._correction(head, hidden, weights), a)
            return DualHeadOutput(postprocess(self.lm_logits(moved), *post), a, gate_logit)
        z_lm = self.lm_logits(hidden)
        z_rm = self.reward_logits(hidden, z_lm, weights)
        if limit_alpha is not None:
            a = self._limited(limit_alpha, z_lm, z_rm, a)
        return DualHeadOutput(self._mix(z_lm, z_rm, a, *post), a, gate_logit)

    # Two steps that need whole rows: a head that has a part of the vocabulary does more.
    def _limited(
        self, limit_alpha: decoding.LimitAlpha, z_lm: Tensor, z_rm: Tensor, alpha: Tensor
    ) -> Tensor:
        return limit_alpha(z_lm, z_rm, alpha)

    def _mix(self, z_lm: Tensor, z_rm: Tensor, alpha: Tensor, *post: float) -> Tensor:
        return mixture.mix_logits(z_lm, z_rm, alpha, self.config.mix, *post)

    def lm_logits(self, hidden: Tensor, bias: bool = True) -> Tensor:
        """z_LM (..., V) of hidden (..., d), before f; ``bias=False`` omits b_LM."""
        weight: Tensor = self.lm_weight
        own_bias: Tensor | None = self.lm_bias if bias else None
        if self.lm_scale is None:
            weight, own_bias = self._cast(hidden, weight, own_bias)
        return mixture.head_logits(hidden, weight, own_bias, self.lm_scale)

    def _correction(
        self, head: CorrectionRewardHead, hidden: Tensor, weights: Tensor | None
    ) -> Tensor:
        """:func:`.mixture.correction` with the maps of this reward head."""
        down, up = (None if w is None else self._cast(hidden, w, None)[0] for w in head.maps)
        return mixture.correction(hidden, down, up, head.bias, weights)

    def reward_logits(self, hidden: Tensor, z_lm: Tensor, weights: Tensor | None) -> Tensor:
        """z_RM (B, ..., V) before f, from hidden (B, ..., d) and objective weights (B, K) or None.
        A correction is added to ``z_lm``.
        """
        head = self.reward_head
        if head.kind == "full":
            weight: Tensor = head.weight
            bias: Tensor | None = head.bias
            if self.reward_scale is None:
                weight, bias = self._cast(hidden, weight, bias)
            return mixture.reward_logits(hidden, weight, bias, weights, self.reward_scale)
        change = self._correction(head, hidden, weights)
        if head.kind == "embedding":
            if head.down is None and weights is None:  # W_LM c, the same at all positions
                change = change[(slice(1),) * (change.dim() - 1)]
            change = self.lm_logits(change.to(hidden.dtype), bias=False)
        return z_lm + change

    @staticmethod
    def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights cast to the dtype of ``hidden``: heads train in fp32 beside a bf16 backbone.
        Under autocast they are returned as they are.
        """
        if weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
            return weight, bias
        return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)

    # --- decoding ---

    @torch.no_grad()
    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> GateCache:
        """An empty cache for ``batch_size`` requests of at most ``max_length`` positions, padding
        included.

        The gate's value path is folded once, here (``u_{s,i} = (W_V,i^T c_i).h_s``,
        ``c = W_O^T w_g``). The cache belongs to the head's current weights: after an update, cast,
        move or load, `prefill` and `step` refuse it.

        Args:
            batch_size, max_length: at least 1.
            dtype, device: of the keys. Default: the head's; others are refused.
        Raises:
            ValueError: a size below 1, or another dtype or device than the head's.
            TypeError: a size that is not an int.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"new_cache: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"new_cache: {name} must be at least 1, got {value}")
            if value >= 2**63:  # beyond what PyTorch takes
                raise ValueError(f"new_cache: {name} must fit in 64 bits, got {value}")
        weight = self.lm_weight
        own = self.hidden_dtype
        if dtype not in (None, own):
            raise ValueError(f"new_cache: dtype must be the LM head's, {own}, got {dtype}")
        if device is not None and not decoding.is_at(device, weight.device):
            raise ValueError(
                f"new_cache: device must be the LM head's, {weight.device}, got {device}"
            )
        heads = (self.gate.num_heads, self.gate.head_dim) if self.gate.has_state else None
        return GateCache(
            decoding.decode_weights(self),
            batch_size,
            max_length,
            heads=heads,
            dtype=own,
            value_dtype=accumulator_dtype(own),
            device=weight.device,
        )

    def check_cache(self, operator: str, cache: GateCache, batch_size: int) -> None:
        """Raise unless this head made ``cache`` with its current weights, for ``batch_size`` rows.

        Raises:
            TypeError: not a GateCache. ValueError: another number of rows.
            RuntimeError: the weights have changed.
        """
        if not isinstance(cache, GateCache):
            raise TypeError(
                f"{operator}: cache must be a GateCache from new_cache, got {type(cache).__name__}"
            )
        if cache.batch_size != batch_size:
            raise ValueError(
                f"{operator}: cache holds {cache.batch_size} rows, hidden has {batch_size}"
            )
        if cache.weights.stamp != decoding.stamp(self):
            raise RuntimeError(
                f"{operator}: the head's weights have changed since the cache was made "
                "(an update, cast, move or load). Its keys belong to the old weights: make a new "
                "cache"
            )

    @torch.no_grad()
    @takes(Controls)
    def prefill(
        self,
        hidden: Tensor,
        cache: GateCache,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 1,
        **arguments: Any,
    ) -> DualHeadOutput:
        """Read a prompt, or the next chunk of one, into the cache.

        Args:
            hidden: (B, T, d). Chunks of any size give the same cache up to rounding (fp32 keys
                differ by about 1e-6 of their size).
            attention_mask: (B, columns + T): the columns of the cache, then the new positions, as
                in Hugging Face. Default: no padding.
            logits_to_keep: N, the number of positions to return logits for, counted back from each
                row's last real position. Default 1; 0 means all T in order. A row with fewer than N
                positions repeats its first.
            arguments: the fields of :class:`dualhead_ext.head.controls.Controls`.
        Returns: logits (B, N, V), alpha and gate_logit (B, N).
        Raises:
            ValueError: a wrong shape or value, or the cache is full. TypeError: a wrong dtype or
                type, or an unknown argument. RuntimeError: the head's weights have changed. The
                cache stays as it was.
        """
        operator = "DualHead.prefill"
        controls = Controls.take(arguments)
        refuse_others(operator, arguments)
        decoding.check_hidden(self, operator, hidden, 3)
        batch, length, _ = hidden.shape
        self.check_cache(operator, cache, batch)
        past = cache.columns
        decoding.check_mask(operator, attention_mask, hidden, past + length)
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int):
            raise TypeError(f"{operator}: logits_to_keep must be an int, got {logits_to_keep!r}")
        if not 0 <= logits_to_keep <= length:
            raise ValueError(
                f"{operator}: logits_to_keep must be in 0..{length}, got {logits_to_keep}"
            )
        cache.require_room(operator, length)
        # Check every argument before the cache is written.
        rows = self.control_rows(operator, controls, hidden)

        if attention_mask is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        else:
            valid = attention_mask[:, past:].to(device=hidden.device, dtype=torch.bool)
        kept = decoding.prompt_positions(valid, logits_to_keep)
        queries = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
        gate_logit = decoding.append_prompt(self, hidden, cache, valid, queries, kept + past)
        return self.mixed(queries, gate_logit, rows)

    @torch.no_grad()
    @takes(Controls, Sampling)
    def step(
        self,
        hidden: Tensor,
        cache: GateCache,
        *,
        return_logits: bool = True,
        record_attention: bool = False,
        impl: str | None = None,
        **arguments: Any,
    ) -> StepOutput:
        """Decode one position per row in one operator call: append to the cache, attend, compute
        both heads, mix, and choose a token.

        Args:
            hidden: (B, d), in the LM head's dtype.
            cache: from :meth:`new_cache`; grows by one column.
            return_logits: whether to return logits. Default True.
            record_attention: whether to return the attention rows. Default False.
            impl: for tests; see :func:`dualhead_ext.head.decoding.run_step`.
            arguments: the fields of :class:`dualhead_ext.head.controls.Controls` and of
                :class:`dualhead_ext.head.controls.Sampling`.
        Returns:
            logits (B, V) or None; alpha and gate_logit (B,); token (B,) int64; logprob (B,), the
                token's log-probability under the mixture at temperature 1 before filters; status
                (B,) int32: 0 success, 1 the row is not finite (token 0), 2 its cache is full
                (nothing written); attention (B, H, T) or None.
        Raises:
            ValueError: a wrong shape or value, or the cache is full. TypeError: a wrong dtype or
                type, or an unknown argument. RuntimeError: the head's weights have changed since
                the cache was made.
        """
        operator = "DualHead.step"
        controls, sampling = Controls.take(arguments), Sampling.take(arguments)
        refuse_others(operator, arguments)
        decoding.check_hidden(self, operator, hidden, 2)
        flags = (("return_logits", return_logits), ("record_attention", record_attention))
        for name, flag in flags:
            if not isinstance(flag, bool):
                raise TypeError(f"{operator}: {name} must be True or False, got {flag!r}")
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.check_cache(operator, cache, hidden.shape[0])
            if not decoding.capturing(hidden.device):
                cache.require_room(operator, 1)
        sampling = sampling.rows(operator, cache, accumulator_dtype(hidden.dtype))
        controls = self.control_rows(operator, controls, hidden, cache)
        out, attention = decoding.run_step(
            self, operator, hidden, cache, controls, sampling,
            return_logits=return_logits, record_attention=record_attention, impl=impl,
        )  # fmt: skip
        return StepOutput(out.logits if return_logits else None, *out[1:6], attention)

    # --- other forms ---

    def _refuse_quantized(self, operator: str) -> None:
        if self.lm_scale is not None:
            raise RuntimeError(
                f"{operator}: the heads are quantised ({self.quantized}); it needs full precision: "
                f"call {operator} before quantize"
            )

    @torch.no_grad()
    def _start_as(self, linear: nn.Linear) -> None:
        """Initialise the reward head from an LM head, and move reward head and gate to its dtype
        and device.
        """
        weight = linear.weight
        self.reward_head.to(device=weight.device, dtype=weight.dtype)
        self.gate.to(device=weight.device, dtype=weight.dtype)
        if weight.device.type != "meta":
            plain = weight.dequantize() if is_torchao(weight) else weight
            self.reward_head.start_from(plain, linear.bias)

    @torch.no_grad()
    def quantize(self, format: str, calibration: Tensor | None = None) -> GatedHead:
        """Quantise both heads in place. The gate keeps its precision, and so does a reward head
        that is a correction. The full-precision weights are discarded: to keep them, quantise a
        copy. A backbone that shares the LM head's weight keeps its own.

        state_dict then also has lm_head.weight_scale and, for a full reward head,
        reward_head.weight_scale.

        Args:
            format: "int8", "fp8" or "int4" (:mod:`dualhead_ext.quantization`).
            calibration: hidden states (..., d) like those that the heads will read, without
                padding. A few thousand reduce the rounding error. Default: for int4 the rows of the
                LM head are used; in other formats each weight is rounded to the nearest value.
        Returns: self.
        Raises:
            ValueError: an unknown format, int4 with hidden_size not a multiple of 128, calibration
                of another shape or not finite. TypeError: calibration that is not a floating-point
                tensor. RuntimeError: the heads are quantised already, or the weights are not in
                memory. The head stays as it was.
        """
        check_format("quantize", format, self.config.hidden_size)
        self._refuse_quantized("quantize")
        weight, head = self.lm_weight, self.reward_head
        reward = head.weight if head.kind == "full" else None
        if "meta" in (weight.device.type, next(head.parameters()).device.type):
            raise RuntimeError("quantize: the heads' weights are not in memory (device meta)")
        dtype = weight.dtype
        plain = weight.dequantize() if is_torchao(weight) else weight
        if calibration is None:
            calibration = stand_ins(plain, format)
        factor = calibration_factor("quantize", calibration, plain)
        if is_torchao(weight):
            lm_quantized = quantized_weights_of("quantize", weight, format)
        else:
            lm_quantized = quantize_with(weight, format, factor)
        if reward is None:
            self._hold_lm(*lm_quantized, dtype)
            return self
        if is_torchao(weight) and torch.equal(reward, plain.expand_as(reward)):
            # It is still a copy of the LM head; quantising it again would give other weights.
            count = self.config.num_objectives
            q, scale = (n.expand(count, *n.shape).clone() for n in lm_quantized)
        else:
            q, scale = quantize_with(reward, format, factor)
        self.hold_quantized(lm_quantized, (q, scale), self.reward_head.bias, dtype)
        return self

    def hold_quantized(
        self,
        lm: tuple[Tensor, Tensor],
        reward: tuple[Tensor, Tensor],
        reward_bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Use quantised (weight, weight_scale) of one format as LM head and as full reward head,
        for hidden states of ``dtype``.
        """
        self._hold_lm(*lm, dtype)
        self.reward_head = QuantizedRewardHead(*reward, reward_bias, dtype)

    def _hold_lm(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Use quantised weights and scales as the LM head, for hidden states of ``dtype``."""
        raise NotImplementedError(f"{type(self).__name__} must define _hold_lm")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Without this check, copy_ would silently convert one format into another.
        for name, own in self.state_dict(keep_vars=True).items():
            given = state_dict.get(prefix + name)
            if given is not None and format_of(given) != format_of(own):
                there, here = (format_of(t) or "full precision" for t in (given, own))
                raise RuntimeError(
                    f"load_state_dict: {prefix}{name} is in {there}, the head in {here}; "
                    "both must have the same format: see quantize"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def merge_objectives(self, weights: Tensor | list[float]) -> DualHead:
        """A K = 1 head whose reward head is the weighted sum of the K: ``sum_k w_k W_RM,k``, or for
        a correction one of rank K r. It shares LM head and gate with this head, and decodes as
        ``objective_weights=weights`` does, at the cost of one reward head.

        Args:
            weights: (K,).
        Raises:
            ValueError, TypeError: weights of another shape or type, or not finite.
            RuntimeError: the heads are quantised.
        """
        self._refuse_quantized("merge_objectives")
        shares = self._shares("merge_objectives", weights)
        reward = self.reward_head
        if reward.kind == "full":
            weight, bias = reward_linear(self, shares)
            state = {"weight": weight[None]} | ({} if bias is None else {"bias": bias[None]})
        else:
            state = concatenate(reward, shares)
        rank = self.config.reward_rank * (1 if reward.kind == "full" else len(shares))
        # The KL curve was measured at uniform weights.
        return self._with_reward(state, num_objectives=1, reward_rank=rank, kl_curve=None)

    def _shares(self, operator: str, weights: Any) -> Tensor:
        """Objective weights (K,) in the accumulator's dtype; None: 1/K each."""
        count, weight = self.config.num_objectives, self.lm_weight
        where = (accumulator_dtype(weight.dtype), weight.device)
        rows = Controls(objective_weights=weights).rows(operator, 1, count, *where)
        if rows.objective_weights is None:
            return torch.full((count,), 1 / count, dtype=where[0], device=where[1])
        return rows.objective_weights[0]

    def _with_reward(self, state: dict[str, Tensor], **changes: Any) -> DualHead:
        """A head with the same LM head and gate, and a reward head loaded from ``state``. changes:
        fields of the config.
        """
        head = DualHead._sharing(self, DualHeadConfig(**{**self.config.to_dict(), **changes}))
        head.reward_head.load_state_dict(state)
        return head

    @torch.no_grad()
    def expand(self) -> DualHead:
        """The same head with ``reward_head="full"``: W_RM,k h + b_RM,k = z_LM + delta_k. It shares
        LM head and gate with this head. It has a bias; an LM head without one gets zeros. Its
        logits are the same if the objective weights add up to 1.

        Raises:
            RuntimeError: the heads are quantised.
        """
        self._refuse_quantized("expand")
        rows = torch.eye(self.config.num_objectives, device=self.lm_weight.device)
        rows = rows.to(accumulator_dtype(self.lm_weight.dtype))
        weights, biases = zip(*(reward_linear(self, row) for row in rows), strict=True)
        state = {"weight": torch.stack(weights)}
        changes: dict[str, Any] = {"reward_head": "full"}
        if biases[0] is not None:
            state, changes = state | {"bias": torch.stack(biases)}, changes | {"bias": True}
        return self._with_reward(state, **changes)

    @torch.no_grad()
    def compress(self, kind: str, rank: int, hidden: Tensor | None = None) -> Compressed:
        """The nearest correction of a kind and rank, by truncated singular value decomposition of
        each W_RM,k - W_LM. It shares LM head and gate with this head.

        Args:
            kind: "embedding" (delta is projected onto the columns of W_LM first) or "lowrank".
            rank: of each objective; 0 for "embedding" only.
            hidden: hidden states (..., d) like those that the head will read. The error over them
                is minimised, and its mean goes into the bias. Default: all directions of the hidden
                space weigh the same.
        Returns:
            (head, error (K,)): sqrt(E |delta - delta'|^2 / E |delta|^2), norms over the vocabulary.
        Raises:
            ValueError: another kind, a rank out of range, or hidden of another shape or not finite.
            RuntimeError: the heads are quantised.
        """
        self._refuse_quantized("compress")
        sizes = self.config
        if kind not in ("embedding", "lowrank"):
            raise ValueError(f'compress: kind must be "embedding" or "lowrank", got {kind!r}')
        DualHeadConfig(**{**sizes.to_dict(), "reward_head": kind, "reward_rank": rank})  # checks
        highest = min(sizes.hidden_size, sizes.vocab_size)
        if rank > highest:
            raise ValueError(f"compress: rank must be at most {highest}, got {rank}")
        if hidden is not None and (
            hidden.dim() < 1 or hidden.shape[-1] != sizes.hidden_size or hidden.numel() == 0
        ):
            shape = tuple(hidden.shape)
            raise ValueError(f"compress: hidden must be (..., {sizes.hidden_size}), got {shape}")
        if hidden is not None and not torch.isfinite(hidden).all():
            raise ValueError("compress: hidden must be finite, got NaN or infinite numbers")
        state, error = compressed_state(self, kind, rank, hidden)
        # The lost part changes the KL divergence, so the curve must be measured again.
        changes = {"reward_head": kind, "reward_rank": rank, "kl_curve": None}
        return Compressed(self._with_reward(state, **changes), error)

    @torch.no_grad()
    def merge_fixed(
        self,
        alpha: float | None = None,
        objective_weights: Tensor | None = None,
        strength: float = 1.0,
    ) -> nn.Linear:
        """The plain linear head ``(1-a) W_LM + a W_RM``, which equals a fixed alpha under the
        logits mix (exactly, in real arithmetic) and costs nothing extra when decoding. Its logits
        are those before the backbone's post-processing. For a correction it has a bias:
        ``W_LM (I + a M)`` with a W_LM c, or ``W_LM + a B A`` with a b.

        Args:
            alpha: in [0, 1]; default ``config.gate_alpha`` of a fixed gate.
            objective_weights: (K,); default 1/K each.
            strength: multiplies alpha. Default 1.
        Raises:
            ValueError: the probability mix (not linear), no alpha for a gate that is not fixed, or
                a value out of range.
            RuntimeError: the heads are quantised.
        """
        self._refuse_quantized("merge_fixed")
        if self.config.mix != "logits":
            raise ValueError(
                'merge_fixed: needs mix="logits"; a mixture of probabilities is not one linear head'
            )
        if alpha is None and self.config.gate != "fixed":
            raise ValueError(f'merge_fixed: alpha must be given for gate="{self.config.gate}"')
        dtype, device = accumulator_dtype(self.lm_weight.dtype), self.lm_weight.device
        a = self.config.gate_alpha if alpha is None else alpha
        rows = Controls(alpha=a, strength=strength).rows("merge_fixed", 1, 1, dtype, device)
        a = rows.alpha[0] * rows.strength[0]
        weight, bias = reward_linear(self, self._shares("merge_fixed", objective_weights))
        linear = nn.Linear(
            self.config.hidden_size, self.config.vocab_size, bias=bias is not None, device="meta"
        )
        own = self.lm_weight
        linear.weight = nn.Parameter(((1 - a) * own.to(dtype) + a * weight).to(own.dtype))
        if bias is not None:
            lm_bias = 0.0 if self.lm_bias is None else self.lm_bias.to(dtype)
            linear.bias = nn.Parameter(((1 - a) * lm_bias + a * bias).to(own.dtype))
        return linear


class DualHead(GatedHead):
    """A dual head of its own, without a model: ``out = DualHead(config)(hidden)``.

    The LM head is frozen (``requires_grad=False``). A full reward head starts as its copy; a
    correction starts at zero.

    state_dict: lm_head.weight (V, d), lm_head.bias? (V,), the reward head
    (reward_head.weight (K, V, d) and reward_head.bias? (K, V) for "full"; see
    :class:`dualhead_ext.head.reward_head.CorrectionRewardHead` for corrections), the weight_scale
    of quantised heads, and the attention gate's gate.{q,k,v}_proj.weight (g, d),
    gate.o_proj.weight (g, g), gate.out.weight (1, g), gate.out.bias (1,).
    """

    lm_head: nn.Linear | QuantizedHead

    def __init__(self, config: DualHeadConfig) -> None:
        super().__init__()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias)
        self.lm_head.requires_grad_(False)
        self._add_gate_and_reward_head(config)
        self.reward_head.start_from(self.lm_head.weight, self.lm_head.bias)

    @property
    def lm_weight(self) -> Tensor:
        return self.lm_head.weight

    @property
    def lm_bias(self) -> nn.Parameter | None:
        return self.lm_head.bias

    @property
    def lm_scale(self) -> Tensor | None:
        return getattr(self.lm_head, "weight_scale", None)

    @property
    def hidden_dtype(self) -> torch.dtype:
        return getattr(self.lm_head, "compute_dtype", self.lm_weight.dtype)

    def _hold_lm(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.lm_head = QuantizedHead(weight, scale, self.lm_bias, dtype)

    @classmethod
    def from_lm_head(cls, lm_head: nn.Linear, **config: Any) -> DualHead:
        """A dual head around a backbone's ``nn.Linear`` (V, d), which is shared and frozen, not
        copied.

        Args:
            lm_head: weight (V, d), with or without a bias.
            config: fields of :class:`DualHeadConfig`; sizes and bias are read from ``lm_head``.
        Raises:
            TypeError: not an nn.Linear. ValueError: ``config`` contradicts ``lm_head``.
        """
        if not isinstance(lm_head, nn.Linear):
            raise TypeError(
                f"DualHead.from_lm_head: lm_head must be an nn.Linear, got {type(lm_head).__name__}"
            )
        check_lm_weight("DualHead.from_lm_head", lm_head.weight, None)
        read = {
            "hidden_size": lm_head.in_features,
            "vocab_size": lm_head.out_features,
            "bias": lm_head.bias is not None,
        }
        for name, value in read.items():
            if config.setdefault(name, value) != value:
                raise ValueError(
                    f"DualHead.from_lm_head: {name} is {value} in lm_head, got {config[name]}"
                )
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.lm_head = lm_head.requires_grad_(False)
        head._add_gate_and_reward_head(DualHeadConfig(**config))
        head._start_as(lm_head)
        return head

    @classmethod
    def _sharing(cls, other: GatedHead, config: DualHeadConfig) -> DualHead:
        """A head with the LM head and the gate of ``other``, and a new reward head."""
        linear = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias, device="meta")
        linear.weight = other.lm_weight
        if config.bias:
            bias = other.lm_bias
            zeros = other.lm_weight.new_zeros(config.vocab_size)
            linear.register_parameter("bias", nn.Parameter(zeros, False) if bias is None else bias)
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.lm_head, head.config, head.gate = linear, config, other.gate
        head.reward_head = make_reward_head(config).to(next(other.reward_head.parameters()))
        return head
