# SPDX-License-Identifier: Apache-2.0
"""The training objective as a function. It checks its arguments and calls `loss.chunked`, which
`loss.reference` defines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import REWARD_HEAD_NAMES
from .loss import chunked
from .loss.heads import Heads
from .loss.pairs import Pairing
from .loss.terms import UNTAUGHT_GATE, DualHeadLossOutput, LossCounts, LossOptions
from .ops.logits import accumulator_dtype

_NAME = "dual_head_loss"


def dual_head_loss(
    hidden: Tensor,
    labels: Tensor,
    mask: Tensor,
    gate_logit: Tensor,
    *,
    lm_weight: Tensor,
    reward_weight: Tensor | None = None,
    lm_bias: Tensor | None = None,
    reward_bias: Tensor | None = None,
    reward_head: str = "full",
    reward_down: Tensor | None = None,
    reward_up: Tensor | None = None,
    mix: str = LossOptions.mix,
    beta_r: float = LossOptions.beta_r,
    lambda_r: float = LossOptions.lambda_r,
    lambda_g: float = LossOptions.lambda_g,
    kl_price: float = LossOptions.kl_price,
    reward_l2: float = LossOptions.reward_l2,
    preference: str = LossOptions.preference,
    pref_gate: int = LossOptions.pref_gate,
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
    pairs: Tensor | None = None,
    objective: Tensor | None = None,
    objective_weights: Tensor | None = None,
    counts: LossCounts | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    impl: Callable[..., DualHeadLossOutput] | None = None,
) -> DualHeadLossOutput:
    """``L = L_LM + lambda_R L_pref + L_gate + L_KL + L_2`` of a batch of pairs, without N x V
    logits.

    ``L_LM = -E_{(x,y)} sum_t log P(y_t)`` of the mixture, over the chosen responses and the rows in
    no pair. ``L_pref = -E log sigmoid(beta_r (r(y+) - r(y-)) - gamma)``. ``L_gate = -lambda_G
    E_t[H(a_t)]`` and ``L_KL = kl_price E_t[KL(pi_mix || pi_LM)]``, over all response tokens.
    ``L_2 = 1/2 reward_l2 E_t[sum_k delta_t,k(y_t)^2]``, for token rewards alone.

    ``preference="log_prob"`` (the paper's): ``r(y) = sum_t log pi_r(y_t)`` with ``pi_r =
    softmax(f(z_RM))``. ``"token_reward"``: ``r(y) = sum_t a_t^kappa delta_t(y_t)`` with ``delta =
    z_RM - z_LM`` before f and kappa = pref_gate. This reads only the rows of the tokens that occur;
    there is no product with the vocabulary unless L_LM or L_KL needs one.

    Source: the paper, Training; `docs/paper.md` lists the departures. Products run in the dtype of
    each weight (autocast applies); log-softmax and everything after it in fp32 (float64 for
    float64).

    Tokens outside ``mask`` have no effect. An empty response has r = 0 and no gradient. A pair of
    two empty responses adds 0 to L_pref. A batch without response tokens has loss 0 and zero
    gradients.

    Rows that are linked by pairs go through the products together, as many as fit into a bounded
    workspace, and their gradients are computed at the same time. So the memory for logits does not
    grow with N. Only a group of linked rows that is too long for the workspace is computed twice.
    There is no second derivative.

    On CUDA the loss synchronises once, to count the tokens. It does not synchronise if ``lengths``
    is given and pairs, objective and objective_weights are on the CPU; wrong labels then fail a
    device assertion.

    Args:
        hidden: (R, T, d), the backbone's final hidden states. By default R = 2P rows [all chosen;
            all rejected]; further rows are for L_LM alone.
        labels: (R, T) int64 or int32, the token that position t predicts, i.e. the input shifted
            by one. In [0, V) where ``mask`` is set, arbitrary elsewhere.
        mask: (R, T) bool or integer; nonzero: the label is a response token.
        gate_logit: (R, T) fp32 (float64 for float64), a = sigmoid(gate_logit). A fixed a of 0 or 1
            is -inf or +inf: entropy 0, no gradient.
        lm_weight, lm_bias: (V, d), (V,).
        reward_head: "full" (default), "embedding" or "lowrank" (`DualHeadConfig`).
        reward_weight, reward_bias: for "full", (V, d) or (K, V, d) and (V,) or (K, V).
        reward_down, reward_up, reward_bias: for the others, D (K, r, d), U (K, n, r) and c (K, n).
            "embedding": delta_k = W_LM (U_k D_k h + c_k), n = d; without down and up its rank is 0.
            "lowrank": delta_k = U_k D_k h + c_k, n = V.
        mix ... logit_softcap: see :class:`dualhead_ext.loss.terms.LossOptions`.
        num_pairs: P of the default pairs. Default: R / 2.
        pairs: (P, 2) int64, rows of (better, worse), instead of the default pairs. A row may be in
            several pairs, as in a ranked list. L_LM then covers the rows that are not the worse one
            of any pair. On the device of hidden or on the CPU.
        objective: (P,) int64, the reward head that L_pref of each pair trains. Default: 0. On the
            device of hidden or on the CPU, like objective_weights.
        objective_weights: (K,), weights of the reward heads in the mixture. Default: 1/K each.
        counts: the divisors of the means, if this batch is a part of a larger one (accumulation,
            several processes). Default: this batch's own counts.
        lengths: (R,), response tokens of each row, ``mask.sum(-1)``: a sequence of int, or a tensor
            on the CPU. Default: counted.
        impl: internal, for tests and benchmarks: the function that computes the loss of checked
            arguments. Default: :func:`dualhead_ext.loss.chunked.dual_head_loss`.
    Returns:
        :class:`dualhead_ext.loss.terms.DualHeadLossOutput`; ``out.loss`` is differentiable with
        respect to hidden, gate_logit and all weights.
    Raises:
        TypeError: an argument that is not a tensor, a wrong dtype, or float64 mixed with another.
        ValueError: shapes that disagree, an empty batch, values out of range, labels outside [0, V)
            where the mask is set, lengths that differ from the mask's, tensors on different
            devices, or a gate_logit that requires a gradient but would get none
            (`LossOptions.teaches_gate`). On CUDA with lengths given, wrong labels and lengths
            fail a device assertion instead.
    """
    options = LossOptions(
        mix=mix,
        beta_r=beta_r,
        lambda_r=lambda_r,
        lambda_g=lambda_g,
        kl_price=kl_price,
        reward_l2=reward_l2,
        preference=preference,
        pref_gate=pref_gate,
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
    if reward_weight is not None and reward_weight.dim() == 2:
        reward_weight = reward_weight[None]
        reward_bias = None if reward_bias is None else reward_bias[None]
    heads = Heads(
        lm_weight, lm_bias, reward_weight, reward_bias, None, reward_head, reward_down, reward_up
    )
    _check_heads(hidden, heads)
    num_rows, num_objectives = hidden.shape[0], heads.num_objectives
    num_pairs = _checked_num_pairs(num_pairs, pairs, num_rows, hidden.device)
    _check_objective(objective, num_pairs, hidden.device)
    weights = _checked_weights(objective_weights, num_objectives, gate_logit)
    if counts is not None and not isinstance(counts, LossCounts):
        raise TypeError(f"{_NAME}: counts must be LossCounts or None, got {type(counts).__name__}")
    lengths = _checked_lengths(lengths, num_rows)
    lengths, (objective, heads.objective_weights, pairs) = _on_host(
        labels, mask, lm_weight.shape[0], lengths, [objective, weights, pairs]
    )
    _check_objective_values(objective, num_objectives)
    if pairs is None:
        row_pairs = [(p, num_pairs + p) for p in range(num_pairs)]
    else:
        row_pairs = _checked_pairs(pairs, num_rows)
    pairing = Pairing(num_rows, row_pairs, None if objective is None else objective.tolist())
    has_lm = any(pairing.in_lm(lm_on_chosen))
    if gate_logit.requires_grad and row_pairs and not options.teaches_gate(has_lm):
        raise ValueError(f"{_NAME}: {UNTAUGHT_GATE}")
    compute = chunked.dual_head_loss if impl is None else impl
    return compute(hidden, labels, mask, gate_logit, heads, options, pairing, counts, lengths)


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


def _check_heads(hidden: Tensor, heads: Heads) -> None:
    kind, size = heads.reward_head, hidden.shape[-1]
    if kind not in REWARD_HEAD_NAMES:
        raise ValueError(
            f"{_NAME}: reward_head must be one of {', '.join(REWARD_HEAD_NAMES)}, got {kind!r}"
        )
    _check_tensor("lm_weight", heads.lm_weight)
    if heads.lm_weight.dim() != 2 or heads.lm_weight.shape[1] != size or not len(heads.lm_weight):
        raise ValueError(
            f"{_NAME}: lm_weight must be (V, {size}), got {tuple(heads.lm_weight.shape)}"
        )
    vocab = len(heads.lm_weight)
    expected = {"lm_weight": (vocab, size), "lm_bias": (vocab,)}
    if kind == "full":
        _check_absent(heads, kind, "reward_down", "reward_up")
        weight = heads.reward_weight
        _check_tensor("reward_weight", weight)
        if weight.shape[-2:] != (vocab, size) or weight.dim() not in (2, 3):
            raise ValueError(
                f"{_NAME}: reward_weight must be ({vocab}, {size}) or (K, {vocab}, {size}), "
                f"got {tuple(weight.shape)}"
            )
        count = len(weight)
        expected |= {"reward_weight": tuple(weight.shape), "reward_bias": tuple(weight.shape[:-1])}
    else:
        _check_absent(heads, kind, "reward_weight")
        width = size if kind == "embedding" else vocab
        _check_tensor("reward_bias", heads.reward_bias)
        count = len(heads.reward_bias) if heads.reward_bias.dim() else 0
        expected |= {"reward_bias": (count, width)}
        if kind == "lowrank" or heads.reward_down is not None or heads.reward_up is not None:
            for name in ("reward_down", "reward_up"):
                _check_tensor(name, getattr(heads, name))
            rank = heads.reward_down.shape[1] if heads.reward_down.dim() == 3 else 0
            expected |= {"reward_down": (count, rank, size), "reward_up": (count, width, rank)}
    if count == 0:
        raise ValueError(f"{_NAME}: reward_{'weight' if kind == 'full' else 'bias'} must hold at "
                         "least one head, got K = 0")  # fmt: skip
    for name, shape in expected.items():
        value = getattr(heads, name)
        if value is None:
            continue
        _check_tensor(name, value)
        _check_shape(name, value, shape, hidden.device)
        if not value.is_floating_point():
            raise TypeError(f"{_NAME}: {name} must be of a floating dtype, got {value.dtype}")
        if (value.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(
                f"{_NAME}: {name} must be float64 if and only if hidden is, got {value.dtype} "
                f"and {hidden.dtype}"
            )
    biased = [("lm", heads.lm_weight, heads.lm_bias)]
    if kind == "full":
        biased.append(("reward", heads.reward_weight, heads.reward_bias))
    for name, weight, bias in biased:
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(
                f"{_NAME}: {name}_bias must be {weight.dtype}, as {name}_weight, got {bias.dtype}"
            )


def _check_absent(heads: Heads, kind: str, *names: str) -> None:
    for name in names:
        if getattr(heads, name) is not None:
            raise ValueError(f'{_NAME}: {name} must be None for reward_head="{kind}"')


def _checked_num_pairs(
    num_pairs: int | None, pairs: Tensor | None, num_rows: int, device: torch.device
) -> int:
    if pairs is not None:
        _check_tensor("pairs", pairs)
        if num_pairs is not None:
            raise ValueError(f"{_NAME}: num_pairs must be None if pairs are given")
        if pairs.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{_NAME}: pairs must be int64, got {pairs.dtype}")
        device = pairs.device if pairs.device.type == "cpu" else device
        _check_shape("pairs", pairs, (len(pairs) if pairs.dim() else 0, 2), device)
        return len(pairs)
    if num_pairs is None:
        if num_rows % 2:
            raise ValueError(
                f"{_NAME}: hidden must have an even number of rows [all chosen; all rejected] "
                f"if num_pairs is not given, got {num_rows}"
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


def _checked_pairs(pairs: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """Check pairs on the CPU, and return them as ints."""
    for better, worse in (found := [(b, w) for b, w in pairs.tolist()]):
        if not (0 <= better < num_rows and 0 <= worse < num_rows) or better == worse:
            raise ValueError(
                f"{_NAME}: pairs must hold two different rows in [0, {num_rows}), "
                f"got ({better}, {worse})"
            )
    return found


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


# --- values that the host needs ------------------------------------------------------------------


def _on_host(
    labels: Tensor,
    mask: Tensor,
    vocab_size: int,
    lengths: list[int] | None,
    others: list[Tensor | None],
) -> tuple[list[int], list[Tensor | None]]:
    """Check labels and lengths, and return (lengths, others) on the CPU. If lengths are given, the
    check runs on the CUDA device, so the host need not wait for it.
    """
    outside = mask.bool() & ((labels < 0) | (labels >= vocab_size))
    counted, wrong = mask.bool().sum(-1), outside.any()
    if lengths is not None and chunked.on_device(mask):
        torch._assert_async(
            wrong.logical_not(), f"{_NAME}: labels must be in [0, {vocab_size}) where mask is set"
        )
        given = torch.tensor(lengths).to(mask.device, non_blocking=True)
        same = (counted == given).all()
        torch._assert_async(same, f"{_NAME}: lengths must be those of mask")
        return lengths, _copied(others)
    counted, wrong, *others = _copied([counted, wrong, *others])
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
    return counted.tolist(), others


def _copied(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The tensors on the CPU, with a single transfer for all that are on a device."""
    there = [x for x in tensors if x is not None and chunked.on_device(x)]
    if not there:
        return tensors
    numbers = torch.cat([x.flatten().double() for x in there]).cpu()
    parts = iter(numbers.split([x.numel() for x in there]))
    return [
        next(parts).view(x.shape).to(x.dtype) if any(x is y for y in there) else x for x in tensors
    ]
