# SPDX-License-Identifier: Apache-2.0
"""Decoding with a gated head: the cache, the prompt, one step. See `reference.decode_step` for what
a step computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..quantization import format_of
from ..reference import accumulator_dtype
from . import correction_step
from .base import DualHeadOutput, HeadBase, StepOutput
from .cache import DecodeWeights, GateCache, parameter_stamp, seeds_of
from .controls import objective_rows, per_row


def _is_at(device: Any, where: torch.device) -> bool:
    """Whether ``device``, which may be anything, names this one."""
    try:
        return torch.empty(0, device=device).device == where
    except (TypeError, ValueError, RuntimeError):
        return False


class DecodingHead(HeadBase):
    """Adds `new_cache`, `prefill` and `step` to the heads and their gate."""

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

        Folds the gate's value path once (``u_{s,i} = (W_V,i^T c_i).h_s``, ``c = W_O^T w_g``). The
        cache is bound to the weights it is made with: after an update, cast, move or load,
        `prefill` and `step` refuse it.

        Args:
            dtype, device: of the keys; must be the head's, which is the default.
        Raises:
            ValueError, TypeError: sizes below 1, or another dtype or device than the head's.
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
        if device is not None and not _is_at(device, weight.device):
            raise ValueError(
                f"new_cache: device must be the LM head's, {weight.device}, got {device}"
            )
        heads = (self.gate.num_heads, self.gate.head_dim) if self.gate.has_state else None
        return GateCache(
            self._decode_weights(),
            batch_size,
            max_length,
            heads=heads,
            dtype=own,
            value_dtype=accumulator_dtype(own),
            device=weight.device,
        )

    def _decode_weights(self) -> DecodeWeights:
        dtype = self.hidden_dtype

        def plain(value: Any) -> Any:
            """In the dtype of hidden states; quantised numbers stay as they are."""
            if not isinstance(value, Tensor):
                return value
            return value.detach() if format_of(value) else value.detach().to(dtype)

        tensors = {name: plain(value) for name, value in self.reward_head.tensors().items()}
        tensors["lm_weight"] = plain(self.lm_weight)
        tensors["lm_bias"] = plain(self.lm_bias)
        scales = {"lm_scale": self.lm_scale, "reward_scale": self.reward_scale}
        tensors |= {name: s.detach() for name, s in scales.items() if s is not None}
        if self.gate.has_state:
            tensors |= {
                "q_weight": plain(self.gate.q_weight),
                "k_weight": plain(self.gate.k_weight),
                "u_weight": self.gate.folded_values().to(accumulator_dtype(dtype)),
                "gate_bias": self.gate.out_bias.detach().to(accumulator_dtype(dtype)),
            }
        return DecodeWeights(tensors, self._stamp())

    def _stamp(self) -> tuple:
        return parameter_stamp(
            [
                self.lm_weight,
                *(() if self.lm_scale is None else (self.lm_scale,)),
                *self.reward_head.parameters(),
                *self.gate.parameters(),
            ]
        )

    def check_cache(self, operator: str, cache: GateCache, batch_size: int) -> None:
        """Raise unless ``cache`` was made by this head with its present weights, for this many
        rows.
        """
        if not isinstance(cache, GateCache):
            raise TypeError(
                f"{operator}: cache must be a GateCache from new_cache, got {type(cache).__name__}"
            )
        if cache.batch_size != batch_size:
            raise ValueError(
                f"{operator}: cache holds {cache.batch_size} rows, hidden has {batch_size}"
            )
        if cache.weights.stamp != self._stamp():
            raise RuntimeError(
                f"{operator}: the head's weights have changed since the cache was made "
                "(an update, cast, move or load); its keys belong to the old ones. Make a new cache"
            )

    @torch.no_grad()
    def prefill(
        self,
        hidden: Tensor,
        cache: GateCache,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 1,
        strength: float | Tensor | None = None,
        gate_offset: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        objective_weights: Tensor | None = None,
        max_kl: float | Tensor | None = None,
        skip_threshold: float | Tensor | None = None,
    ) -> DualHeadOutput:
        """Read a prompt, or the next chunk of one, into the cache.

        Args:
            hidden: (B, T, d). Any chunking gives the same cache, but for the rounding of products
                of other sizes (fp32 keys differ by about 1e-6 of their size).
            attention_mask: (B, columns + T), over what the cache holds and the new positions, as in
                Hugging Face.
            logits_to_keep: N, positions to return logits for, counted back from each row's last
                real one; 0 means all T in their order. A row with fewer than N positions repeats
                its first.
            Controls: as in :meth:`forward`.
        Returns: logits (B, N, V), alpha and gate_logit (B, N).
        Raises:
            ValueError: shapes, no room (the cache is left as it was). RuntimeError: the head's
                weights have changed.
        """
        operator = "DualHead.prefill"
        self._check_hidden(operator, hidden, 3)
        batch, length, _ = hidden.shape
        self.check_cache(operator, cache, batch)
        past = cache.columns
        self._check_mask(operator, attention_mask, hidden, past + length)
        if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int):
            raise TypeError(f"{operator}: logits_to_keep must be an int, got {logits_to_keep!r}")
        if not 0 <= logits_to_keep <= length:
            raise ValueError(
                f"{operator}: logits_to_keep must be in 0..{length}, got {logits_to_keep}"
            )
        cache.require_room(operator, length)

        positions = torch.arange(length, device=hidden.device)
        if attention_mask is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        else:
            valid = attention_mask[:, past:].to(device=hidden.device, dtype=torch.bool)
        kept = positions.expand(batch, -1)
        if logits_to_keep:
            last = torch.where(valid, positions, -1).amax(1)
            last = torch.where(
                last < 0, length - 1, last
            )  # nothing real in this chunk: its last column
            kept = (last[:, None] + positions[:logits_to_keep] - logits_to_keep + 1).clamp(min=0)
        queries = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
        # Everything that can fail on a caller's argument comes before the cache is written.
        controls = {
            "strength": strength,
            "gate_offset": gate_offset,
            "alpha": alpha,
            "objective_weights": objective_weights,
            "max_kl": max_kl,
            "skip_threshold": skip_threshold,
        }
        self._check_controls(operator, batch, hidden.device, **controls)
        gate_logit = self._append(hidden, cache, valid, queries, kept + past)
        return self._mixed(operator, queries, gate_logit, **controls)

    def _append(
        self, hidden: Tensor, cache: GateCache, valid: Tensor, queries: Tensor, columns: Tensor
    ) -> Tensor:
        """Write (B, T, d) into the cache and return the gate logits (B, N) of queries (B, N, d) at
        ``columns`` (B, N).
        """
        if not self.gate.has_state:
            cache.append(None, None, valid)
            return self.gate(queries)
        weights = cache.weights
        u_weight = weights.tensors["u_weight"]
        cache.append(*self.gate.keys_and_values(hidden, u_weight, weights.projection), valid)
        filled = slice(0, cache.columns)
        return self.gate.attend(
            queries, columns, cache.k[:, :, filled], cache.u[:, :, filled], cache.valid[:, filled]
        )

    @torch.no_grad()
    def step(
        self,
        hidden: Tensor,
        cache: GateCache,
        do_sample: bool = False,
        temperature: float | Tensor | None = 1.0,
        top_k: int | Tensor | None = 0,
        top_p: float | Tensor | None = 1.0,
        min_p: float | Tensor | None = 0.0,
        strength: float | Tensor | None = None,
        gate_offset: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        objective_weights: Tensor | None = None,
        max_kl: float | Tensor | None = None,
        skip_threshold: float | Tensor | None = None,
        seeds: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_logits: bool = True,
        record_attention: bool = False,
    ) -> StepOutput:
        """One new position per row: append, attend, both products, mix, and a token, in one
        operator call.

        Args:
            hidden: (B, d), in the LM head's dtype.
            cache: from :meth:`new_cache`; grows by one column.
            do_sample: False takes the argmax (ties: the lowest index).
            temperature, top_k, top_p, min_p: numbers or (B,) tensors, applied in this order as
                Hugging Face does. temperature 0 is greedy. strength, gate_offset, alpha,
                objective_weights, max_kl, skip_threshold: as in :meth:`forward`; with max_kl, eager
                PyTorch computes the step.
            seeds: (B,) int64. Default: drawn from ``generator`` once per cache. Token n of a
                request depends on its seed, n and its distribution alone, not on its place in a
                batch.
            return_logits: whether out.logits is wanted; record_attention: whether the attention
                rows are.
        Returns:
            logits (B, V) or None; alpha, gate_logit, logprob (B,), of the mixture at temperature 1
                before filters; token (B,) int64; status (B,) int32: 0 fine, 1 the row is not finite
                (token 0), 2 its cache is full (nothing written); attention (B, H, T) or None.
        Raises:
            ValueError, TypeError: arguments. RuntimeError: the head's weights have changed since
                the cache was made.
        """
        operator = "DualHead.step"
        self._check_hidden(operator, hidden, 2)
        if not isinstance(do_sample, bool):
            raise TypeError(f"{operator}: do_sample must be True or False, got {do_sample!r}")
        sampling: dict[str, Tensor | None] = {}
        draw = None
        if do_sample:
            batch, dtype = hidden.shape[0], accumulator_dtype(hidden.dtype)
            self.check_cache(operator, cache, batch)
            fill = None if torch.compiler.is_compiling() else cache.per_row
            filters = (
                ("temperature", temperature, 1.0),
                ("top_k", top_k, 0),
                ("top_p", top_p, 1.0),
                ("min_p", min_p, 0.0),
            )
            for name, value, off in filters:
                if isinstance(value, Tensor) or value != off:
                    kind = torch.int32 if name == "top_k" else dtype
                    device = hidden.device
                    sampling[name] = per_row(operator, name, value, batch, kind, device, fill)
            draw = partial(seeds_of, operator, cache, seeds, generator)
        controls = {
            "strength": strength,
            "gate_offset": gate_offset,
            "alpha": alpha,
            "objective_weights": objective_weights,
            "max_kl": max_kl,
            "skip_threshold": skip_threshold,
        }
        return self._run_step(
            operator,
            hidden,
            cache,
            controls,
            sampling,
            draw=draw,
            return_logits=return_logits,
            record_attention=record_attention,
        )

    def _run_step(
        self,
        operator: str,
        hidden: Tensor,
        cache: GateCache,
        controls: dict[str, Any],
        sampling: dict[str, Tensor | None],
        *,
        draw: Callable[[], Tensor] | None = None,
        new_valid: Tensor | None = None,
        post_process: bool = True,
        return_logits: bool = True,
        record_attention: bool = False,
    ) -> StepOutput:
        """:meth:`step` with its filters made tensors. ``draw`` gives its seeds, once nothing is
        left to refuse.

        ``new_valid`` (B,) marks new positions that are padding; ``post_process=False`` leaves out
        the backbone's own f (logits mix only), for a backbone that applies it itself.
        """
        batch, device = hidden.shape[0], hidden.device
        dtype = accumulator_dtype(hidden.dtype)
        compiling = torch.compiler.is_compiling()
        for name, flag in (
            ("return_logits", return_logits),
            ("record_attention", record_attention),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{operator}: {name} must be True or False, got {flag!r}")
        if not compiling:
            self.check_cache(operator, cache, batch)
            if not capturing(device):
                cache.require_room(operator, 1)
        fill = None if compiling else cache.per_row
        arguments = cache.weights.tensors | sampling
        for name in ("strength", "gate_offset", "alpha", "skip_threshold"):
            value = controls.get(name)
            arguments[name] = per_row(operator, name, value, batch, dtype, device, fill)
        arguments["objective_weights"] = objective_rows(
            operator,
            controls.get("objective_weights"),
            batch,
            self.config.num_objectives,
            dtype,
            device,
        )
        attends = self.gate.has_state
        if attends:
            arguments |= {
                "cache_k": cache.k,
                "cache_u": cache.u,
                "cache_valid": cache.valid,
                "cache_length": cache.length,
                "new_valid": new_valid,
            }
        else:
            arguments["gate_logit"] = self.gate(hidden)
        function = self._decode_function(hidden)
        limit = self._alpha_limit(operator, controls.get("max_kl"), batch, dtype, device)
        if limit is not None:
            function = partial(reference.decode_step, limit_alpha=limit)
        if draw is not None:
            arguments |= {"seeds": draw(), "draws": cache.draws}
        out = function(
            hidden=hidden,
            mix_probs=self.config.mix == "probs",
            logit_scale=self.config.logit_scale if post_process else 1.0,
            logit_softcap=self.config.logit_softcap if post_process else 0.0,
            return_logits=return_logits,
            record_attention=record_attention and attends,
            **arguments,
        )
        if not attends:
            cache.length += 1
        if compiling:
            cache.advanced_on_device()
        else:
            cache.count_step()
        recorded = out.attention[:, :, : cache.columns] if record_attention and attends else None
        return StepOutput(out.logits if return_logits else None, *out[1:6], recorded)

    def _decode_function(self, hidden: Tensor):
        """The compiled kernel where one applies; otherwise the reference, with one warning where
        that is a surprise.
        """
        if ops.kernel_for(hidden.device.type, hidden.dtype):
            full = self.reward_head.kind == "full"
            return ops.decode_step if full else correction_step.decode_step
        if hidden.dtype != torch.float64:
            ops.warn_of_reference(hidden.device.type, hidden.dtype)
        return reference.decode_step


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: the host's count of columns then says nothing about
    the replays.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
