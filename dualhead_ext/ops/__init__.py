# SPDX-License-Identifier: Apache-2.0
"""The compiled operators: typed wrappers, fake kernels for the compiler, and documentation. The
schemas are in csrc/ops.cpp; :mod:`dualhead_ext.reference` defines what they compute.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..reference import DecodeOutput
from . import library

# Device type -> dtypes of its kernel; the bindings in csrc/ops_*.cpp refuse others.
_KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def kernel_for(device_type: str, dtype: torch.dtype) -> bool:
    """Whether :func:`decode_step` has a compiled kernel for hidden states of ``dtype`` on
    ``device_type``, with heads of the same dtype or quantised ones.

    If not, :func:`dualhead_ext.reference.decode_step` takes the same arguments.
    """
    dtypes = _KERNEL_DTYPES.get(device_type, ())
    return dtype in dtypes and library.problem(device_type) is None


_warned: set[tuple[str, torch.dtype]] = set()


def warn_of_reference(device_type: str, dtype: torch.dtype) -> None:
    """Warn, once per device type and dtype, that eager PyTorch is used instead of a kernel."""
    if (device_type, dtype) in _warned:
        return
    _warned.add((device_type, dtype))
    warnings.warn(
        f"dualhead_ext: no compiled decode kernel for {device_type} tensors of {dtype}; "
        "eager PyTorch is used instead, which is slower. `dualhead info` says what was built",
        RuntimeWarning,
        stacklevel=4,
    )


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: the best of :func:`cpu_isa_levels`, or the one in the
    environment variable DUALHEAD_FORCE_ISA.

    Raises:
        RuntimeError: DUALHEAD_FORCE_ISA is unknown or not supported by this machine, or the
            compiled library is missing.
    """
    library.require("cpu")
    return torch.ops.dualhead.cpu_isa()


def cpu_isa_levels() -> list[str]:
    """The instruction sets that are compiled in and supported by this machine, best first.

    Raises:
        RuntimeError: the compiled library is missing.
    """
    library.require("cpu")
    return torch.ops.dualhead.cpu_isa_levels().split(",")


def decode_step(
    *,
    hidden: Tensor,
    lm_weight: Tensor,
    lm_bias: Tensor | None = None,
    reward_head: str = "full",
    reward_weight: Tensor | None = None,
    reward_down: Tensor | None = None,
    reward_up: Tensor | None = None,
    reward_bias: Tensor | None = None,
    objective_weights: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    u_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    cache_k: Tensor | None = None,
    cache_u: Tensor | None = None,
    cache_valid: Tensor | None = None,
    cache_length: Tensor | None = None,
    new_valid: Tensor | None = None,
    gate_logit: Tensor | None = None,
    gate_offset: Tensor | None = None,
    strength: Tensor | None = None,
    alpha: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    draws: Tensor | None = None,
    mix_probs: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float = 0.0,
    return_logits: bool = True,
    record_attention: bool = False,
    lm_scale: Tensor | None = None,
    reward_scale: Tensor | None = None,
    skip_threshold: Tensor | None = None,
) -> DecodeOutput:
    """One decode step in one operator call, from hidden states to tokens.

    It appends the new position to the gate's cache, attends over the cache, mixes both heads and
    chooses a token::

        l = sum_i sum_s softmax_s(q_i . k_{s,i} / sqrt(d_k)) u_{s,i} + gate_bias     (+ gate_offset)
        a = max(strength * (alpha or sigmoid(l)), 0)                with mix_probs at most 1;
            then 0 if a < s, 1 if |1 - a| < s
        z = f((1 - a) z_LM + a z_RM)                                or, with mix_probs,
        z = log((1 - a) softmax(f(z_LM)) + a softmax(f(z_RM)))
        z_RM = sum_k w_k (W_RM,k h + b_RM,k)                        reward_head "full"
        z_RM = z_LM + sum_k w_k W_LM (U_k D_k h + c_k)              "embedding"
        z_RM = z_LM + sum_k w_k (U_k D_k h + c_k)                   "lowrank"
        token = argmax z, or a draw from softmax(z / temperature) after top-k, top-p and min-p

    with ``f(z) = cap tanh(logit_scale z / cap)`` (``logit_softcap`` = cap; 0: no cap) and s =
    skip_threshold. Equals :func:`dualhead_ext.reference.decode_step` up to rounding, with fp32 sums
    everywhere. The result is deterministic: a row's bits depend neither on its batch nor on the
    number of threads. Batches that take GEMMs are the exception (CUDA: beyond 64 rows that are not
    quantised; the CPU's portable level: fp32 from 32 rows on); those repeat from run to run.

    All tensors are on one device. W stands for the dtype of the weights, float32 or bfloat16 (CUDA:
    also float16). Elements within a row of a weight must be adjacent; rows may have any stride.

    Args:
        hidden: (B, d) W.
        lm_weight, lm_bias: (V, d) and (V,) W.
        reward_head: "full", or a correction, "embedding" or "lowrank", which reads the LM head's
            matrix once. On the CPU the logits mix of "embedding" is W_LM (h + a (M h + c)); the sum
            is rounded to bf16 if the processor multiplies bf16. Elsewhere W_LM multiplies h and
            M h + c separately, both in the dtype of hidden.
        reward_weight, reward_bias: (K, V, d) and (K, V) W, for "full".
        reward_down, reward_up, reward_bias: D (K, r, d), U (K, n, r) and c (K, n) W, for a
            correction; n = d for "embedding" and V for "lowrank". Rank 0 has neither D nor U.
        objective_weights: (B, K) fp32, w. Default: 1/K each.
        q_weight, k_weight: (g, d) W, g = H d_k; u_weight: (H, d) fp32, the folded value rows
            (``reference.fold_values``); gate_bias: (1,) fp32.
        cache_k: (B, H, S, d_k) W; cache_u: (B, H, S) fp32; cache_valid: (B, S) bool; cache_length:
            (B,) int32, columns filled. All four are updated in place: column ``cache_length[b]`` is
            written, and the length grows by one.
        new_valid: (B,) bool, False if the new position is padding. Default: all True.
        gate_logit: (B,) fp32, the logit of a gate without a cache (-inf and inf: alpha 0 and 1).
            The eight arguments of the attention gate are then None.
        gate_offset, strength, alpha: (B,) fp32 controls. strength 0 selects z_LM, bit for bit.
        skip_threshold: (B,) fp32, s above. If a = 0 in every row, the reward head's weights are not
            read; if a = 1 in every row, the LM head's are not. This saves time and does not change
            a row's result. Thresholding changes logits by at most s |z_RM - z_LM| in the logits
            mix, and probabilities by at most s in total variation in the probability mix.
        temperature, top_p, min_p: (B,) fp32; top_k: (B,) int32. Filters of sampled rows, in the
            order above. temperature 0 is greedy; top_k <= 0, top_p >= 1 and min_p <= 0 are off.
        seeds: (B,) int64, or None for greedy decoding.
        draws: (B,) int64, with seeds: how often each row has drawn; grows by one. The noise is a
            function of (seed, draw, token) alone.
        mix_probs: whether probabilities are mixed, see above. logit_scale, logit_softcap: f.
        return_logits: whether to return logits. record_attention: whether to return attention.
        lm_scale, reward_scale: fp32, for quantised weights (:mod:`dualhead_ext.quantization`):
            (V,) and (K, V), or (V, d/128) and (K, V, d/128). lm_weight and reward_weight are then
            both int8, float8_e4m3fn, or uint8 (V, d/2) for int4; W is the dtype of hidden. A
            correction is not quantised and has no reward_scale.

    Returns:
        DecodeOutput: logits (B, V) (log-probabilities with mix_probs), alpha (B,), gate_logit (B,)
        fp32; token (B,) int64; logprob (B,) fp32, of the token under softmax(logits), before
        temperature and filters; status (B,) int32: 0 success, 1 the row is not finite (token 0,
        logprob NaN), 2 its cache is full (nothing written, all outputs NaN or 0); attention
        (B, H, S) fp32. Outputs that were not requested have shape (0,).

    Raises:
        TypeError: a wrong dtype, or an argument that is not a tensor.
        ValueError: a wrong shape, device or layout, or arguments that contradict each other.
        RuntimeError: an argument requires a gradient in grad mode (the operator has no backward
            pass), or the library is missing. Nothing has been written.
    """
    # In the schema's order. A tuple is 3 us faster than a dict of names.
    arguments = (
        hidden, lm_weight, lm_bias, lm_scale,
        reward_head, reward_weight, reward_down, reward_up, reward_bias, reward_scale,
        objective_weights,
        q_weight, k_weight, u_weight, gate_bias,
        cache_k, cache_u, cache_valid, cache_length, new_valid,
        gate_logit, gate_offset, strength, alpha, skip_threshold,
        temperature, top_k, top_p, min_p,
        seeds, draws,
        mix_probs, logit_scale, logit_softcap, return_logits, record_attention,
    )  # fmt: skip
    # The dispatcher would accept any truthy value as a bool.
    if not type(mix_probs) is type(return_logits) is type(record_attention) is bool:
        raise _as_python_error(RuntimeError(), arguments)
    if torch.is_grad_enabled():
        _refuse_gradients(arguments)
    if torch.compiler.is_compiling():
        return DecodeOutput(*_decode_step(*arguments))
    try:
        return DecodeOutput(*_decode_step(*arguments))
    except RuntimeError as error:
        raise _as_python_error(error, arguments) from None


def _refuse_gradients(arguments: tuple) -> None:
    if any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
        raise RuntimeError(
            "decode_step: has no gradient, but an argument requires one; call it under "
            "torch.no_grad(), or use reference.decode_step"
        )


def _as_python_error(error: RuntimeError, arguments: tuple) -> Exception:
    """The exception in the type that Python users expect: only RuntimeError crosses the stable ABI.
    The text stays in one place, csrc/decode_binding.h."""
    if _decode_step is _missing:
        return error
    for value, schema in zip(arguments, _decode_step._schema.arguments, strict=True):
        expected, types = _EXPECTED[str(schema.type)]
        if not isinstance(value, types):
            got = type(value).__name__
            return TypeError(f"decode_step: {schema.name} must be {expected}, got {got}")
    text = str(error)
    if not text.startswith("decode_step: "):
        return error
    return TypeError(text) if " must have dtype " in text else ValueError(text)


# Schema type -> (text for errors, accepted types).
_EXPECTED: dict[str, tuple[str, Any]] = {
    "Tensor": ("a tensor", Tensor),
    "Optional[Tensor]": ("a tensor or None", (Tensor, type(None))),
    "str": ("a string", str),
    "bool": ("a bool", bool),
    "float": ("a number", (int, float)),
}


def _missing(*arguments: Any, **named: Any) -> None:
    """Replaces the operator if the library is missing, and raises the reason."""
    library.require("cpu")


_decode_step: Any = _missing

if library.problem("cpu") is None:
    _decode_step = torch.ops.dualhead.decode_step.default
    _ARGUMENTS = [argument.name for argument in _decode_step._schema.arguments]

    @torch.library.register_fake("dualhead::decode_step")
    def _decode_step_fake(*values):
        named = dict(zip(_ARGUMENTS, values, strict=True))
        hidden, lm_weight, cache_k = (named[n] for n in ("hidden", "lm_weight", "cache_k"))
        for value in values:
            # A call with a meta tensor among real ones comes here, not to the kernel's check.
            if isinstance(value, Tensor) and value.device != hidden.device:
                raise RuntimeError(
                    "decode_step: all tensors must be on the device of hidden "
                    f"({hidden.device}), got one on {value.device}"
                )
        batch = hidden.shape[0]
        return_logits = named["return_logits"]
        fp32 = {"dtype": torch.float32}
        nothing = (0,)
        recorded = named["record_attention"] and cache_k is not None
        return (
            hidden.new_empty((batch, lm_weight.shape[0]) if return_logits else nothing, **fp32),
            hidden.new_empty((batch,), **fp32),
            hidden.new_empty((batch,), **fp32),
            hidden.new_empty((batch,), dtype=torch.int64),
            hidden.new_empty((batch,), **fp32),
            hidden.new_empty((batch,), dtype=torch.int32),
            hidden.new_empty(cache_k.shape[:3] if recorded else nothing, **fp32),
        )


def loss_rows_kernel_for(z: Tensor) -> bool:
    """Whether :func:`loss_rows` and :func:`loss_rows_backward_` support logits like ``z``."""
    device = z.device.type
    has_kernel = device in _KERNEL_DTYPES and z.dtype == torch.float32
    return has_kernel and library.problem(device) is None


def loss_rows(
    z_lm: Tensor | None,
    z_rm: Tensor,
    gate_logit: Tensor,
    labels: Tensor,
    mixed: bool,
    reward: bool,
    mix_probs: bool,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the labels under the mixture and under the reward head.

    The PyTorch functions in :mod:`dualhead_ext.loss.rows` define it and have the formulas.

    Args:
        z_lm, z_rm: (n, V) fp32, contiguous, on the CPU or CUDA; z_lm is None if nothing is mixed.
        gate_logit: (n,) fp32. labels: (n,) int64 in [0, V).
        mixed, reward: which of the two log-probabilities to compute.
        mix_probs, logit_scale, logit_softcap: as in :func:`decode_step`.
    Returns:
        mixed, reward: (n,) fp32, at most 0; (0,) if not requested. normalizers (2, n) float64, for
        :func:`loss_rows_backward_`: of the mixture and of the reward head, 0 if not needed.
    Raises:
        RuntimeError: a wrong shape, dtype or layout; the message names it.
        ValueError: on the CPU, a label outside [0, V). On CUDA the check would synchronise; there
            the row gets NaN. Nothing has been written.
    """
    labels, outside = _labels_inside("loss_rows", labels, z_rm)
    of_mixture, of_reward, normalizers = torch.ops.dualhead.loss_rows(
        z_lm, z_rm, gate_logit, labels, mixed, reward, mix_probs, logit_scale, logit_softcap
    )
    for found in (of_mixture, of_reward):
        found.clamp_(max=0.0)  # rounding may give a probability above 1
        if outside is not None and found.numel():
            found.masked_fill_(outside, torch.nan)
    if not mixed:
        normalizers[0].zero_()
    if not reward and not mix_probs:
        normalizers[1].zero_()
    return of_mixture, of_reward, normalizers


def _labels_inside(operator: str, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """(labels that are safe to index with, on CUDA which labels were outside [0, V)). An index
    outside would read another row or another tensor.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or logits.dim() != 2:
        return labels, None  # the operator says what is wrong
    vocabulary = logits.shape[-1]
    if labels.device.type == "cpu":
        if labels.numel() and not isinstance(labels, FakeTensor):  # which has no values to look at
            low, high = (int(bound) for bound in labels.aminmax())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"{operator}: labels must be in 0..{vocabulary - 1}, got "
                    f"{low if low < 0 else high}"
                )
        return labels, None
    return labels.clamp(0, vocabulary - 1), (labels < 0) | (labels >= vocabulary)


def loss_rows_backward_(
    z_lm: Tensor | None,
    z_rm: Tensor,
    gate_logit: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    mixed: Tensor | None,
    mixed_grad: Tensor | None,
    reward_grad: Tensor | None,
    write_lm: bool,
    mix_probs: bool,
    logit_scale: float,
    logit_softcap: float,
) -> Tensor:
    """Overwrite z_rm, and z_lm if ``write_lm``, by the gradients of ``sum_n mixed_grad log P_y +
    reward_grad log softmax(f(z_RM))_y``. Returns the gradient of gate_logit, (n,), or (0,) if
    nothing is mixed.

    Args:
        normalizers, mixed: from :func:`loss_rows`; mixed is None if nothing is mixed.
        mixed_grad, reward_grad: (n,) fp32 upstream gradients, or None.
        others: as given to :func:`loss_rows`.
    Raises:
        RuntimeError, ValueError: see :func:`loss_rows`. On CUDA, the gradients of a row whose label
        is outside [0, V) become NaN.
    """
    labels, outside = _labels_inside("loss_rows_backward_", labels, z_rm)
    gate = torch.ops.dualhead.loss_rows_backward_(
        z_lm, z_rm, gate_logit, labels, normalizers, mixed, mixed_grad, reward_grad, write_lm,
        mix_probs, logit_scale, logit_softcap,
    )  # fmt: skip
    if outside is not None:
        for z in (z_rm, z_lm if write_lm else None):
            if z is not None:
                z.masked_fill_(outside[:, None], torch.nan)
    return gate


if library.problem("cpu") is None:

    @torch.library.register_fake("dualhead::loss_rows")
    def _loss_rows_fake(z_lm, z_rm, gate_logit, labels, mixed, reward, *rest):
        n = z_rm.shape[0]
        return (
            z_rm.new_empty((n if mixed else 0,)),
            z_rm.new_empty((n if reward else 0,)),
            z_rm.new_empty((2, n), dtype=torch.float64),
        )

    @torch.library.register_fake("dualhead::loss_rows_backward_")
    def _loss_rows_backward_fake(z_lm, z_rm, gate_logit, labels, normalizers, mixed, *rest):
        return z_rm.new_empty((0 if mixed is None else z_rm.shape[0],))
