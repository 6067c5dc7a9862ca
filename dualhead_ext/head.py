# SPDX-License-Identifier: Apache-2.0
"""The dual head: two linear heads and a gate on the hidden states of a backbone.

`GatedHead` is all of it except where the LM head's weight lives: `DualHead` here owns an
`nn.Linear`, `modeling.DualHeadLMHead` is the backbone's own lm_head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import DualHeadConfig
from .controls import objective_rows, per_row
from .head_decode import DecodingHead
from .quantization import calibration_factor, check_format, format_of, quantize_with, stand_ins
from .quantized_head import QuantizedHead
from .reference import accumulator_dtype
from .reward_head import QuantizedRewardHead, make_reward_head
from .torchao_weights import check_lm_weight, is_torchao, numbers_of


class GatedHead(DecodingHead):
    """Gate, reward head, decoding, and the simpler heads that equal this one in special cases."""

    def _refuse_quantized(self, operator: str) -> None:
        if self.lm_scale is not None:
            raise RuntimeError(
                f"{operator}: the heads are quantised ({self.quantized}); it needs full precision, "
                "which is there before quantize"
            )

    @torch.no_grad()
    def _start_as(self, linear: nn.Linear) -> None:
        """Reward head, as its copy, and gate in the dtype and on the device of an LM head."""
        weight = linear.weight
        self.reward_head.to(device=weight.device, dtype=weight.dtype)
        self.gate.to(device=weight.device, dtype=weight.dtype)
        if weight.device.type != "meta":
            plain = weight.dequantize() if is_torchao(weight) else weight
            self.reward_head.start_from(plain, linear.bias)

    @torch.no_grad()
    def quantize(self, format: str, calibration: Tensor | None = None) -> GatedHead:
        """Both heads in ``format``, "int8", "fp8" or "int4" (:mod:`dualhead_ext.quantization`), in
        place; the gate stays, and so does a reward head that is a correction. Full precision is
        gone: quantise a copy to keep it. A weight that is shared with a backbone is replaced here
        and stays as it is there.

        state_dict then has lm_head.weight_scale and, of a full reward head,
        reward_head.weight_scale.

        Args:
            calibration: hidden states (..., d) like those that the heads will read, padding left
                out: a few thousand make less error of the same format. Default: for int4 the LM
                head's own rows, which point to where hidden states do; else none, and each number
                is the nearest one.
        Returns: self.
        Raises:
            ValueError: an unknown format, int4 with hidden_size not a multiple of 128, calibration
                of another shape or not finite. TypeError: calibration that is not a floating-point
                tensor. RuntimeError: quantised already, or the weights are not in memory. Nothing
                has changed then.
        """
        check_format("quantize", format, self.config.hidden_size)
        self._refuse_quantized("quantize")
        weight, full = self.lm_weight, self.reward_head.kind == "full"
        reward = self.reward_head.weight if full else None
        if "meta" in (weight.device.type, next(self.reward_head.parameters()).device.type):
            raise RuntimeError("quantize: the heads' weights are not in memory (device meta)")
        dtype = weight.dtype
        plain = weight.dequantize() if is_torchao(weight) else weight
        if calibration is None:
            calibration = stand_ins(plain, format)
        factor = calibration_factor("quantize", calibration, plain)
        if is_torchao(weight):
            lm_numbers = numbers_of("quantize", weight, format)
        else:
            lm_numbers = quantize_with(weight, format, factor)
        if reward is None:
            self._hold_lm(*lm_numbers, dtype)
            return self
        if is_torchao(weight) and torch.equal(reward, plain.expand_as(reward)):
            # Still the LM head's copy: rounding the values anew would give other numbers.
            count = self.config.num_objectives
            reward_numbers = tuple(n.expand(count, *n.shape).clone() for n in lm_numbers)
        else:
            reward_numbers = quantize_with(reward, format, factor)
        self.hold_numbers(lm_numbers, reward_numbers, self.reward_head.bias, dtype)
        return self

    def hold_numbers(
        self,
        lm: tuple[Tensor, Tensor],
        reward: tuple[Tensor, Tensor],
        reward_bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Take (weight, weight_scale) of one format as LM head and as full reward heads, for
        hidden states of ``dtype``.
        """
        self._hold_lm(*lm, dtype)
        self.reward_head = QuantizedRewardHead(*reward, reward_bias, dtype)

    def _hold_lm(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Take numbers of a format as the LM head, for hidden states of ``dtype``."""
        raise NotImplementedError(f"{type(self).__name__} must define _hold_lm")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Without this, copy_ would turn the one kind of numbers into the other without a word.
        for name, own in self.state_dict(keep_vars=True).items():
            given = state_dict.get(prefix + name)
            if given is not None and format_of(given) != format_of(own):
                there, here = (format_of(t) or "full precision" for t in (given, own))
                raise RuntimeError(
                    f"load_state_dict: {prefix}{name} is in {there}, the head in {here}; "
                    "a state fits a head of its own format: see quantize"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def merge_objectives(self, weights: Tensor | list[float]) -> DualHead:
        """A K = 1 head with ``sum_k w_k W_RM,k`` as its reward head, sharing LM head and gate with
        this one.

        weights: (K,). Decodes as ``objective_weights=weights`` does, at the cost of one reward
        head.
        """
        self._refuse_quantized("merge_objectives")
        dtype = accumulator_dtype(self.reward_head.weight.dtype)
        row = objective_rows(
            "merge_objectives", weights, 1, self.config.num_objectives, dtype, self.lm_weight.device
        )
        # The KL curve was measured at uniform weights.
        changes = {"num_objectives": 1, "kl_curve": None}
        config = DualHeadConfig(**{**self.config.to_dict(), **changes})
        merged = DualHead._sharing(self, config)
        merged.reward_head.weight.copy_(
            torch.einsum("k,kvd->vd", row[0], self.reward_head.weight.to(dtype))[None]
        )
        if self.reward_head.bias is not None:
            merged.reward_head.bias.copy_(row @ self.reward_head.bias.to(dtype))
        return merged

    @torch.no_grad()
    def merge_fixed(
        self, alpha: float | None = None, objective_weights: Tensor | None = None
    ) -> nn.Linear:
        """The plain linear head ``(1-a) W_LM + a W_RM`` that a fixed alpha amounts to under the
        logits mix (exact in real arithmetic), at no decoding cost. Its logits are those before the
        backbone's post-processing.

        Args:
            alpha: in [0, 1]; default ``config.gate_alpha`` of a fixed gate.
        Raises:
            ValueError: the probability mix (not linear), or no alpha for a gate that is not fixed.
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
        a = per_row("merge_fixed", "alpha", a, 1, dtype, device)[0]
        shares = objective_rows(
            "merge_fixed", objective_weights, 1, self.config.num_objectives, dtype, device
        )
        if shares is None:
            shares = torch.full(
                (1, self.config.num_objectives),
                1 / self.config.num_objectives,
                dtype=dtype,
                device=device,
            )
        linear = nn.Linear(
            self.config.hidden_size, self.config.vocab_size, bias=self.config.bias, device="meta"
        )
        rm = torch.einsum("k,kvd->vd", shares[0], self.reward_head.weight.to(dtype))
        linear.weight = nn.Parameter(
            ((1 - a) * self.lm_weight.to(dtype) + a * rm).to(self.lm_weight.dtype)
        )
        if self.config.bias:
            bias = (1 - a) * self.lm_bias.to(dtype) + a * (
                shares @ self.reward_head.bias.to(dtype)
            )[0]
            linear.bias = nn.Parameter(bias.to(self.lm_bias.dtype))
        return linear


class DualHead(GatedHead):
    """A dual head of its own: ``out = DualHead(config)(hidden)``.

    state_dict: lm_head.weight (V, d), lm_head.bias?, reward_head.weight (K, V, d),
    reward_head.bias? (K, V), the weight_scale of both if quantised, and the gate's
    gate.{q,k,v}_proj.weight (g, d), gate.o_proj.weight (g, g), gate.out.weight (1, g),
    gate.out.bias (1,). The LM head is frozen (``requires_grad=False``); the reward head starts as
    its copy.
    """

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
    def lm_bias(self) -> Tensor | None:
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
        """A dual head around a backbone's ``nn.Linear`` (V, d): the very same module, shared and
        frozen, not copied.

        config: fields of :class:`DualHeadConfig`; sizes and bias are read from the linear layer.

        Raises:
            TypeError: not an nn.Linear. ValueError: sizes in ``config`` that contradict it.
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
        """A head with ``other``'s LM head and gate and a fresh reward head."""
        linear = nn.Linear(config.hidden_size, config.vocab_size, bias=config.bias, device="meta")
        linear.weight = other.lm_weight
        if config.bias:
            linear.bias = other.lm_bias
        head = cls.__new__(cls)
        nn.Module.__init__(head)
        head.lm_head, head.config, head.gate = linear, config, other.gate
        head.reward_head = make_reward_head(config).to(next(other.reward_head.parameters()))
        return head
