# SPDX-License-Identifier: Apache-2.0
"""Functions behind the decoding methods of a gated head: checks, the weights that a step reads, and
the step. `reference.decode_step` defines what a step computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..config import DualHeadConfig
from ..ops.huge_pages import use_huge_pages
from ..ops.logits import accumulator_dtype
from ..quantization import format_of
from .cache import DecodeWeights, GateCache, parameter_stamp
from .controls import Controls, Sampling
from .kl_cap import capped_alpha
from .rows import dense

# (z_LM, z_RM, alpha) -> alpha within max_kl
LimitAlpha = Callable[[Tensor, Tensor, Tensor], Tensor]


def is_at(device: Any, where: torch.device) -> bool:
    """Whether ``device``, which may be any object, names the device ``where``."""
    try:
        return torch.empty(0, device=device).device == where
    except (TypeError, ValueError, RuntimeError):
        return False


def check_hidden(head: Any, operator: str, hidden: Tensor, dim: int) -> None:
    """Raise TypeError or ValueError unless hidden is (B, T, d) or (B, d), as the head reads it."""
    shape = f"(B, T, {head.config.hidden_size})" if dim == 3 else f"(B, {head.config.hidden_size})"
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{operator}: hidden must be a tensor {shape}, got {type(hidden).__name__}")
    dense(operator, "hidden", hidden)
    if hidden.dim() != dim or hidden.shape[-1] != head.config.hidden_size or 0 in hidden.shape:
        raise ValueError(
            f"{operator}: hidden must be {shape} and not empty, got {tuple(hidden.shape)}"
        )
    weight = head.lm_weight
    if hidden.device != weight.device:
        raise ValueError(
            f"{operator}: hidden must be on {weight.device}, as the LM head, got {hidden.device}"
        )
    dtype = head.hidden_dtype
    if hidden.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{operator}: hidden must be {dtype}, as the LM head, got {hidden.dtype}")


def check_mask(operator: str, mask: Tensor | None, hidden: Tensor, length: int) -> None:
    """Raise TypeError or ValueError unless the mask is None or (B, ``length``)."""
    if mask is None:
        return
    dense(operator, "attention_mask", mask, hidden.device)
    expected = (hidden.shape[0], length)
    if mask.shape != expected:
        raise ValueError(f"{operator}: attention_mask must be {expected}, got {tuple(mask.shape)}")


def decode_weights(head: Any) -> DecodeWeights:
    """The weights that a decode step of ``head`` reads, at their current values."""
    dtype = head.hidden_dtype

    def plain(value: Any) -> Any:
        """``value`` in the dtype of hidden states; quantised weights keep their dtype."""
        if not isinstance(value, Tensor):
            return value
        return value.detach() if format_of(value) else value.detach().to(dtype)

    tensors = {name: plain(value) for name, value in head.reward_head.tensors().items()}
    tensors["lm_weight"] = plain(head.lm_weight)
    tensors["lm_bias"] = plain(head.lm_bias)
    scales = {"lm_scale": head.lm_scale, "reward_scale": head.reward_scale}
    tensors |= {name: s.detach() for name, s in scales.items() if s is not None}
    if head.gate.has_state:
        tensors |= {
            "q_weight": plain(head.gate.q_weight),
            "k_weight": plain(head.gate.k_weight),
            "u_weight": head.gate.folded_values().to(accumulator_dtype(dtype)),
            "gate_bias": head.gate.out_bias.detach().to(accumulator_dtype(dtype)),
        }
    use_huge_pages(tensors.values())
    return DecodeWeights(tensors, stamp(head))


def stamp(head: Any) -> tuple:
    """Identifies the current values of the weights of ``head``."""
    return parameter_stamp(
        [
            head.lm_weight,
            *(() if head.lm_scale is None else (head.lm_scale,)),
            *head.reward_head.parameters(),
            *head.gate.parameters(),
        ]
    )


def prompt_positions(valid: Tensor, count: int) -> Tensor:
    """The last ``count`` positions (B, N) of each row of ``valid`` (B, T), up to the last real one;
    0: all positions. A row with fewer repeats its first.
    """
    batch, length = valid.shape
    positions = torch.arange(length, device=valid.device)
    if not count:
        return positions.expand(batch, -1)
    last = torch.where(valid, positions, -1).amax(1)
    last = torch.where(last < 0, length - 1, last)  # nothing real in this chunk: its last column
    return (last[:, None] + positions[:count] - count + 1).clamp(min=0)


def append_prompt(
    head: Any, hidden: Tensor, cache: GateCache, valid: Tensor, queries: Tensor, columns: Tensor
) -> Tensor:
    """Write hidden (B, T, d) into the cache and return the gate logits (B, N) of queries (B, N, d)
    at ``columns`` (B, N).
    """
    if not head.gate.has_state:
        cache.append(None, None, valid)
        return head.gate(queries)
    weights = cache.weights
    u_weight = weights.tensors["u_weight"]
    k, u = head.gate.keys_and_values(hidden, u_weight, weights.projection)
    cache.append(k, u, valid)
    filled = slice(0, cache.columns)
    return head.gate.attend(
        queries, columns, cache.k[:, :, filled], cache.u[:, :, filled], cache.valid[:, filled]
    )


def alpha_limit(config: DualHeadConfig, max_kl: Tensor | None) -> LimitAlpha | None:
    """A function that keeps alpha within max_kl (B,); None without a cap. It includes the
    backbone's f even if the backbone applies f itself.
    """
    if max_kl is None:
        return None
    return partial(
        capped_alpha,
        max_kl=max_kl,
        mix=config.mix,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
    )


def run_step(
    head: Any,
    operator: str,
    hidden: Tensor,
    cache: GateCache,
    controls: Controls,
    sampling: Sampling,
    *,
    new_valid: Tensor | None = None,
    post_process: bool = True,
    return_logits: bool = True,
    record_attention: bool = False,
    impl: str | None = None,
) -> tuple[ops.DecodeOutput, Tensor | None]:
    """One decode step: (the operator's output, the attention rows if recorded). The caller has
    checked the cache, which has room, and controls and sampling are rows.

    Args:
        new_valid: (B,), False for new positions that are padding.
        post_process: False omits f, for a backbone that applies its f itself (logits mix only).
        impl: for tests, "kernel" or "reference". Default: the kernel if one applies.
    """
    arguments = cache.weights.tensors | controls.operands()
    attends = head.gate.has_state
    if attends:
        arguments |= {
            "cache_k": cache.k,
            "cache_u": cache.u,
            "cache_valid": cache.valid,
            "cache_length": cache.length,
            "new_valid": new_valid,
        }
    else:
        arguments["gate_logit"] = head.gate(hidden)
    function = _step_function(head, hidden, controls.max_kl, impl)
    # This comes last: seeds must not be drawn for a call that is refused.
    arguments |= sampling.operands(operator, cache)
    out = function(
        hidden=hidden,
        mix_probs=head.config.mix == "probs",
        logit_scale=head.config.logit_scale if post_process else 1.0,
        logit_softcap=head.config.logit_softcap if post_process else 0.0,
        return_logits=return_logits,
        record_attention=record_attention and attends,
        **arguments,
    )
    if not attends:
        cache.length += 1
    if torch.compiler.is_compiling():
        cache.advanced_on_device()
    else:
        cache.count_step()
    recorded = out.attention[:, :, : cache.columns] if record_attention and attends else None
    return out, recorded


def _step_function(
    head: Any, hidden: Tensor, max_kl: Tensor | None, impl: str | None
) -> Callable[..., ops.DecodeOutput]:
    """The compiled kernel if one applies, otherwise the reference. Unless the caller expects the
    reference (float64, ``max_kl``), one warning says so.
    """
    limit = alpha_limit(head.config, max_kl)
    if limit is not None:
        return partial(reference.decode_step, limit_alpha=limit)
    if impl is None and ops.kernel_for(hidden.device.type, hidden.dtype):
        impl = "kernel"
    if impl == "kernel":
        return ops.decode_step
    if impl is None and hidden.dtype != torch.float64:
        ops.warn_of_reference(hidden.device.type, hidden.dtype)
    return reference.decode_step


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. The host's count of columns is then meaningless for
    the replays.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
