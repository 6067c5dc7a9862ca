# SPDX-License-Identifier: Apache-2.0
"""The training objective as a function: checks its arguments, then computes `fused_loss`, which
means what `reference_loss` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fused_loss, reference_loss
from .losses import DualHeadLossOutput, LossCounts, LossOptions
from .reference import accumulator_dtype

_NAME = "dual_head_loss"


def dual_head_loss(
    hidden: Tensor,
    labels: Tensor,
    mask: Tensor,
    gate_logit: Tensor,
    *,
    lm_weight: Tensor,
    reward_weight: Tensor,
    lm_bias: Tensor | None = None,
    reward_bias: Tensor | None = None,
    mix: str = LossOptions.mix,
    beta_r: float = LossOptions.beta_r,
    lambda_r: float = LossOptions.lambda_r,
    lambda_g: float = LossOptions.lambda_g,
    gate_regularizer: str = LossOptions.gate_regularizer,
    lm_reduction: str = LossOptions.lm_reduction,
    pref_on: str = LossOptions.pref_on,
    pref_reduction: str = LossOptions.pref_reduction,
    gamma: float = LossOptions.gamma,
    label_smoothing: float = LossOptions.label_smoothing,
    lm_on_chosen: bool = LossOptions.lm_on_chosen,
    logit_scale: float = LossOptions.logit_scale,
    logit_softcap: float = LossOptions.logit_softcap,
    num_pairs: int | None = None,
    objective: Tensor | None = None,
    objective_weights: Tensor | None = None,
    counts: LossCounts | None = None,
    lengths: Sequence[int] | Tensor | None = None,
) -> DualHeadLossOutput:
    """``L = L_LM + lambda_R L_pref + L_gate`` of a batch of pairs, without N x V logits.

    ``L_LM = -E_{(x,y)} sum_t log P(y_t)`` of the mixture over the chosen responses and the rows
    after the pairs; ``L_pref = -E log sigmoid(beta_r (sum_t log pi_r(y+_t) - sum_t log pi_r(y-_t))
    - gamma)`` with ``pi_r = softmax(f(z_RM))``; ``L_gate = -lambda_G E_t[H(a_t)]`` over all
    response tokens. Source: the paper, Training; `docs/paper.md` has the departures. Products run
    in the dtype of each weight (autocast applies), log-softmax and all that follows in fp32
    (float64 for float64).

    A token outside ``mask`` has no part in anything, whatever is stored there. An empty response
    has log-probability 0 and no gradient; a pair of two counts 0 in L_pref; a batch with no
    response token has loss 0 and zero gradients.

    Whole pairs go through the products together, as many as fit into a bounded workspace, and
    their gradients are made at once: memory does not grow with N, and nothing is computed twice
    but for a pair that is too long by itself. There is a first derivative only.

    How many tokens there are decides over every size, so a loss on CUDA waits for the device: once,
    or not at all where ``lengths`` says it and objective and objective_weights are on the CPU. What
    is wrong with the labels is then found by an assertion on the device.

    Args:
        hidden: (R, T, d), the backbone's final hidden states; R = 2P rows [all chosen; all
            rejected], then rows for L_LM alone.
        labels: (R, T) int64 or int32, the token that position t predicts, i.e. the input shifted
            by one; in [0, V) where ``mask`` is set, anything elsewhere.
        mask: (R, T) bool (or nonzero = set): the label is a response token.
        gate_logit: (R, T) fp32 (float64 for float64), a = sigmoid(gate_logit); a fixed a of 0 or 1
            is -inf or +inf: entropy 0, no gradient.
        lm_weight, lm_bias: (V, d), (V,).
        reward_weight, reward_bias: (V, d) or (K, V, d); (V,) or (K, V).
        mix ... logit_softcap: see :class:`dualhead_ext.losses.LossOptions`.
        num_pairs: P; default R / 2.
        objective: (P,) int64, the head that L_pref of each pair acts on; default 0. On the device
            of hidden or on the CPU, as objective_weights.
        objective_weights: (K,), how L_LM's mixture weighs the heads; default 1/K each.
        counts: what the means divide by, where this batch is a part of a larger one
            (accumulation, several processes); default this batch's own.
        lengths: (R,), response tokens of each row, ``mask.sum(-1)``, known to the host: a sequence
            of int, or a tensor on the CPU. Default: counted.
    Returns:
        :class:`dualhead_ext.losses.DualHeadLossOutput`; ``out.loss`` is differentiable with respect
        to hidden, gate_logit and the four weights.
    Raises:
        TypeError: not a tensor, a wrong dtype, a float64 mixed with another.
        ValueError: shapes that disagree, an empty batch, values out of range, labels outside [0, V)
            where the mask is set, lengths that are not the mask's, tensors on different devices.
            On CUDA with lengths given, a device assertion says so of labels and lengths.
    """
    options = LossOptions(
        mix=mix,
        beta_r=beta_r,
        lambda_r=lambda_r,
        lambda_g=lambda_g,
        gate_regularizer=gate_regularizer,
        lm_reduction=lm_reduction,
        pref_on=pref_on,
        pref_reduction=pref_reduction,
        gamma=gamma,
        label_smoothing=label_smoothing,
        lm_on_chosen=lm_on_chosen,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )
    _check_batch(hidden, labels, mask, gate_logit)
    _check_heads(hidden, lm_weight, lm_bias, reward_weight, reward_bias)
    if reward_weight.dim() == 2:
        reward_weight = reward_weight[None]
        reward_bias = None if reward_bias is None else reward_bias[None]
    num_pairs = _checked_num_pairs(num_pairs, hidden.shape[0])
    num_objectives = reward_weight.shape[0]
    _check_objective(objective, num_pairs, hidden.device)
    weights = _checked_weights(objective_weights, num_objectives, gate_logit)
    if counts is not None and not isinstance(counts, LossCounts):
        raise TypeError(f"{_NAME}: counts must be LossCounts or None, got {type(counts).__name__}")
    lengths = _checked_lengths(lengths, hidden.shape[0])
    lengths, objective, weights = _on_host(
        labels, mask, lm_weight.shape[0], lengths, objective, weights
    )
    _check_objective_values(objective, num_objectives)
    heads = reference_loss.Heads(lm_weight, lm_bias, reward_weight, reward_bias, weights)
    return fused_loss.dual_head_loss(
        hidden, labels, mask, gate_logit, heads, options, num_pairs, objective, counts, lengths
    )


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(value).__name__}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{_NAME}: {name} must be {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{_NAME}: {name} must be on {device}, as hidden, got {value.device}")


def _check_batch(hidden: Tensor, labels: Tensor, mask: Tensor, gate_logit: Tensor) -> None:
    for name, value in (
        ("hidden", hidden),
        ("labels", labels),
        ("mask", mask),
        ("gate_logit", gate_logit),
    ):
        _check_tensor(name, value)
    if hidden.dim() != 3 or 0 in hidden.shape:
        raise ValueError(
            f"{_NAME}: hidden must be (R, T, d) and not empty, got {tuple(hidden.shape)}"
        )
    if not hidden.is_floating_point():
        raise TypeError(f"{_NAME}: hidden must be of a floating dtype, got {hidden.dtype}")
    for name, value in (("labels", labels), ("mask", mask), ("gate_logit", gate_logit)):
        _check_shape(name, value, tuple(hidden.shape[:2]), hidden.device)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_NAME}: labels must be int64 or int32, got {labels.dtype}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{_NAME}: mask must be bool or an integer dtype, got {mask.dtype}")
    expected = accumulator_dtype(hidden.dtype)
    if gate_logit.dtype != expected:
        raise TypeError(f"{_NAME}: gate_logit must be {expected}, got {gate_logit.dtype}")


def _check_heads(
    hidden: Tensor,
    lm_weight: Tensor,
    lm_bias: Tensor | None,
    reward_weight: Tensor,
    reward_bias: Tensor | None,
) -> None:
    for name, value in (("lm_weight", lm_weight), ("reward_weight", reward_weight)):
        _check_tensor(name, value)
    size = hidden.shape[-1]
    if lm_weight.dim() != 2 or lm_weight.shape[1] != size or lm_weight.shape[0] == 0:
        raise ValueError(f"{_NAME}: lm_weight must be (V, {size}), got {tuple(lm_weight.shape)}")
    vocab = lm_weight.shape[0]
    if reward_weight.shape[-2:] != lm_weight.shape or reward_weight.dim() not in (2, 3):
        raise ValueError(
            f"{_NAME}: reward_weight must be ({vocab}, {size}) or (K, {vocab}, {size}), "
            f"got {tuple(reward_weight.shape)}"
        )
    if reward_weight.shape[0] == 0:
        raise ValueError(f"{_NAME}: reward_weight must hold at least one head, got K = 0")
    for name, value, shape in (
        ("lm_weight", lm_weight, tuple(lm_weight.shape)),
        ("lm_bias", lm_bias, (vocab,)),
        ("reward_weight", reward_weight, tuple(reward_weight.shape)),
        ("reward_bias", reward_bias, tuple(reward_weight.shape[:-1])),
    ):
        if value is None:
            continue
        _check_tensor(name, value)
        _check_shape(name, value, shape, hidden.device)
        if not value.is_floating_point():
            raise TypeError(f"{_NAME}: {name} must be of a floating dtype, got {value.dtype}")
        if (value.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(
                f"{_NAME}: {name} must be float64 exactly where hidden is, got {value.dtype} "
                f"beside {hidden.dtype}"
            )
    for name, weight, bias in (("lm", lm_weight, lm_bias), ("reward", reward_weight, reward_bias)):
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(
                f"{_NAME}: {name}_bias must be {weight.dtype}, as {name}_weight, got {bias.dtype}"
            )


def _checked_num_pairs(num_pairs: int | None, num_rows: int) -> int:
    if num_pairs is None:
        if num_rows % 2:
            raise ValueError(
                f"{_NAME}: hidden must have an even number of rows [all chosen; all rejected] "
                f"where num_pairs is not given, got {num_rows}"
            )
        return num_rows // 2
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, int):
        raise TypeError(f"{_NAME}: num_pairs must be an int, got {num_pairs!r}")
    if not 0 <= num_pairs <= num_rows // 2:
        raise ValueError(
            f"{_NAME}: num_pairs must be in [0, {num_rows // 2}] for {num_rows} rows, "
            f"got {num_pairs}"
        )
    return num_pairs


def _check_objective(objective: Tensor | None, num_pairs: int, device: torch.device) -> None:
    if objective is None:
        return
    _check_tensor("objective", objective)
    if objective.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_NAME}: objective must be int64, got {objective.dtype}")
    if objective.device.type == "cpu":
        device = objective.device
    _check_shape("objective", objective, (num_pairs,), device)


def _check_objective_values(objective: Tensor | None, num_objectives: int) -> None:
    values = [0] if objective is None else [0, *objective.tolist()]
    if min(values) < 0 or max(values) >= num_objectives:
        raise ValueError(
            f"{_NAME}: objective must hold numbers in [0, {num_objectives}), "
            f"got {min(values[1:])} ... {max(values[1:])}"
        )


def _checked_weights(weights: Any, num_objectives: int, like: Tensor) -> Tensor | None:
    if weights is None:
        return None
    weights = torch.as_tensor(weights)
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"{_NAME}: objective_weights must hold numbers, got {weights.dtype}")
    if weights.shape != (num_objectives,):
        raise ValueError(
            f"{_NAME}: objective_weights must be ({num_objectives},), got {tuple(weights.shape)}"
        )
    return weights.to(like.dtype)


def _checked_lengths(lengths: Any, num_rows: int) -> list[int] | None:
    if lengths is None:
        return None
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(f"{_NAME}: lengths must be on the CPU, got {lengths.device}")
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or not all(type(n) is int for n in lengths):
        raise TypeError(f"{_NAME}: lengths must be a sequence of int, got {lengths!r}")
    if len(lengths) != num_rows:
        raise ValueError(f"{_NAME}: lengths must be of {num_rows} rows, got {len(lengths)}")
    return list(lengths)


# --- what the host must know ---------------------------------------------------------------------


def _on_host(
    labels: Tensor,
    mask: Tensor,
    vocab_size: int,
    lengths: list[int] | None,
    objective: Tensor | None,
    weights: Tensor | None,
) -> tuple[list[int], Tensor | None, Tensor | None]:
    """lengths, objective and weights on the CPU, once the labels are checked: by the host, or,
    where it would wait for CUDA for nothing else, by the device.
    """
    outside = mask.bool() & ((labels < 0) | (labels >= vocab_size))
    counted, wrong = mask.bool().sum(-1), outside.any()
    if lengths is not None and fused_loss.on_device(mask):
        torch._assert_async(
            wrong.logical_not(), f"{_NAME}: labels must be in [0, {vocab_size}) where mask is set"
        )
        given = torch.tensor(lengths).to(mask.device, non_blocking=True)
        same = (counted == given).all()
        torch._assert_async(same, f"{_NAME}: lengths must be those of mask")
        return lengths, *_copied([objective, weights])
    counted, wrong, objective, weights = _copied([counted, wrong, objective, weights])
    if wrong:
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{_NAME}: labels must be in [0, {vocab_size}) where mask is set, "
            f"got {labels[where].item()} at {where}"
        )
    if lengths is not None and lengths != counted.tolist():
        raise ValueError(
            f"{_NAME}: lengths must be those of mask, {counted.tolist()}, got {lengths}"
        )
    return counted.tolist(), objective, weights


def _copied(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """On the CPU, by one transfer of all that are not yet there."""
    there = [x for x in tensors if x is not None and fused_loss.on_device(x)]
    if not there:
        return tensors
    numbers = torch.cat([x.flatten().double() for x in there]).cpu()
    parts = iter(numbers.split([x.numel() for x in there]))
    return [
        next(parts).view(x.shape).to(x.dtype) if any(x is y for y in there) else x for x in tensors
    ]
