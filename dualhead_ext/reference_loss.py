# SPDX-License-Identifier: Apache-2.0
"""The training objective in plain PyTorch: the meaning of `functional.dual_head_loss`.

    L_LM   = -E_{(x,y)} sum_t log P(y_t | x, y_<t)                     P the mixture
    L_pref = -E log sigmoid(beta_r (sum_t log pi_r(y+_t) - sum_t log pi_r(y-_t)) - gamma)
    L_gate = -lambda_G E_t[H(a_t)]
    L      = L_LM + lambda_R L_pref + L_gate

Response tokens alone reach the heads: prompts and padding are dropped before the products. R rows =
2P of pairs, then rows for the language model term alone; N tokens of one of these three parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import (
    GATE_REGULARIZERS,
    LM_REDUCTIONS,
    PREFERENCE_REDUCTIONS,
    SATURATION_LOGIT,
    DualHeadLossOutput,
    LossCounts,
    LossOptions,
    gate_entropy,
    pair_loss,
)
from .reference import head_logits, postprocess, reward_logits


@dataclass
class Heads:
    """Both heads' weights: lm_weight (V, d), lm_bias (V,), reward_weight (K, V, d), reward_bias
    (K, V); objective_weights (K,) or None for 1/K each.
    """

    lm_weight: Tensor
    lm_bias: Tensor | None
    reward_weight: Tensor
    reward_bias: Tensor | None
    objective_weights: Tensor | None

    def lm(self, hidden: Tensor) -> Tensor:
        """z_LM (N, V)."""
        return head_logits(hidden.to(self.lm_weight.dtype), self.lm_weight, self.lm_bias)

    def reward(self, hidden: Tensor) -> Tensor:
        """z_RM = sum_k w_k z_k (N, V)."""
        hidden = hidden.to(self.reward_weight.dtype)
        weights = None if self.objective_weights is None else self.objective_weights[None]
        return reward_logits(hidden, self.reward_weight, self.reward_bias, weights)

    def objective(self, hidden: Tensor, k: int) -> Tensor:
        """z_k (N, V), the logits of one objective's head."""
        bias = None if self.reward_bias is None else self.reward_bias[k]
        return head_logits(hidden.to(self.reward_weight.dtype), self.reward_weight[k], bias)


@dataclass
class Part:
    """Response tokens of consecutive rows: rows, columns, labels, gate_logit, objective (N,);
    hidden (N, d).
    """

    rows: Tensor
    columns: Tensor
    hidden: Tensor
    labels: Tensor
    gate_logit: Tensor
    objective: Tensor | None

    def __getitem__(self, index: Tensor) -> Part:
        objective = None if self.objective is None else self.objective[index]
        return Part(
            *(x[index] for x in (self.rows, self.columns, self.hidden, self.labels)),
            self.gate_logit[index],
            objective,
        )


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """``log softmax(z)_y``: logits (N, V) fp32 or float64, labels (N,) -> (N,)."""
    return -F.cross_entropy(logits, labels.long(), reduction="none")


def mixed_log_probs(
    z_lm: Tensor, z_rm: Tensor, gate_logit: Tensor, labels: Tensor, options: LossOptions
) -> Tensor:
    """``log P(y)`` of the mixture: z_lm, z_rm (N, V), gate_logit l, labels (N,) -> (N,).

    logits: ``log softmax(f(sigmoid(-l) z_LM + sigmoid(l) z_RM))_y``. probs: ``logaddexp(logsigmoid
    (-l) + log softmax(f(z_LM))_y, logsigmoid(l) + log softmax(f(z_RM))_y)``. Both keep what a
    saturated alpha would round away; where a share is exactly 0 the other head is selected.
    """
    post = (options.logit_scale, options.logit_softcap)
    lm_share, rm_share = torch.sigmoid(-gate_logit), torch.sigmoid(gate_logit)
    lm_only, rm_only = rm_share == 0, lm_share == 0
    if options.mix == "logits":
        mixed = lm_share[:, None] * z_lm + rm_share[:, None] * z_rm
        mixed = torch.where(lm_only[:, None], z_lm, torch.where(rm_only[:, None], z_rm, mixed))
        return token_log_probs(postprocess(mixed, *post), labels)
    lm = token_log_probs(postprocess(z_lm, *post), labels)
    rm = token_log_probs(postprocess(z_rm, *post), labels)
    mixed = torch.logaddexp(F.logsigmoid(-gate_logit) + lm, F.logsigmoid(gate_logit) + rm)
    return torch.where(lm_only, lm, torch.where(rm_only, rm, mixed))


def _part_log_probs(
    part: Part, heads: Heads, options: LossOptions, in_lm: bool, in_pairs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Log-probabilities (N,) of the language model term and of the preference term, or None for a
    term that the part is not in; z_LM is computed only where one of them needs it.
    """
    one = heads.reward_weight.shape[0] == 1 and heads.objective_weights is None
    mixed_pairs = in_pairs and options.pref_on == "mixed"
    z_lm = heads.lm(part.hidden) if in_lm or mixed_pairs else None
    z_rm = heads.reward(part.hidden) if in_lm or (one and in_pairs) else None
    lm = mixed_log_probs(z_lm, z_rm, part.gate_logit, part.labels, options) if in_lm else None
    if not in_pairs:
        return lm, None
    if one:
        if mixed_pairs:
            return lm, mixed_log_probs(z_lm, z_rm, part.gate_logit, part.labels, options)
        return lm, _reward_log_probs(z_rm, part.labels, options)
    pref = torch.zeros_like(part.gate_logit)
    for k in range(heads.reward_weight.shape[0]):
        index = (part.objective == k).nonzero().squeeze(-1)
        chosen = part[index]
        z_k = heads.objective(chosen.hidden, k)
        if mixed_pairs:
            logps = mixed_log_probs(z_lm[index], z_k, chosen.gate_logit, chosen.labels, options)
        else:
            logps = _reward_log_probs(z_k, chosen.labels, options)
        pref = pref.index_put((index,), logps.to(pref.dtype))
    return lm, pref


def _reward_log_probs(z_rm: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """``log pi_r(y)``, ``pi_r = softmax(f(z_RM))``."""
    return token_log_probs(postprocess(z_rm, options.logit_scale, options.logit_softcap), labels)


def _sequence_sums(part: Part, logps: Tensor, first_row: int, num_rows: int, length: int) -> Tensor:
    """Sums over each row's tokens, in a fixed order: logps (N,) -> (num_rows,)."""
    dense = logps.new_zeros(num_rows, length)
    return dense.index_put((part.rows - first_row, part.columns), logps).sum(-1)


def dual_head_loss(
    hidden: Tensor,
    labels: Tensor,
    mask: Tensor,
    gate_logit: Tensor,
    heads: Heads,
    options: LossOptions,
    num_pairs: int,
    objective: Tensor | None = None,
    counts: LossCounts | None = None,
) -> DualHeadLossOutput:
    """The objective over checked arguments, which :func:`dualhead_ext.functional.dual_head_loss`
    documents. Differentiable with respect to hidden, gate_logit and the heads' weights.
    """
    num_rows, length = mask.shape
    rows, columns = mask.bool().nonzero(as_tuple=True)
    if objective is None:
        objective = torch.zeros(num_pairs, dtype=torch.long, device=rows.device)
    of_row = torch.cat((objective, objective, objective.new_zeros(num_rows - 2 * num_pairs)))
    kept = Part(
        rows,
        columns,
        hidden[rows, columns],
        labels[rows, columns],
        gate_logit[rows, columns],
        of_row[rows],
    )
    # Row-major, so each of the three parts is a run of tokens: a slice, not a copy.
    bounds = torch.tensor([num_pairs, 2 * num_pairs], device=rows.device)
    cuts = [0, *torch.searchsorted(rows, bounds).tolist(), rows.shape[0]]
    in_lm = (options.lm_on_chosen, False, True)
    lm_sum, pair_logps, lm_tokens = kept.gate_logit.new_zeros(()), [], 0
    for i, (start, end) in enumerate(pairwise(cuts)):
        part = kept[slice(start, end)]
        lm, pref = _part_log_probs(part, heads, options, in_lm[i], in_pairs=i < 2)
        if lm is not None:
            lm_sum, lm_tokens = lm_sum + lm.sum(), lm_tokens + end - start
        if pref is not None:
            pair_logps.append(_sequence_sums(part, pref, i * num_pairs, num_pairs, length))
    lengths = mask.bool().sum(-1)
    own = LossCounts(
        num_rows - 2 * num_pairs + (num_pairs if options.lm_on_chosen else 0),
        lm_tokens,
        num_pairs,
        rows.shape[0],
    )
    return _combine(lm_sum, pair_logps, kept.gate_logit, lengths, own, counts or own, options)


def _combine(
    lm_sum: Tensor,
    pair_logps: list[Tensor],
    gate_logit: Tensor,
    lengths: Tensor,
    own: LossCounts,
    counts: LossCounts,
    options: LossOptions,
) -> DualHeadLossOutput:
    """The three terms and their sum: lm_sum 0-d, pair_logps 2 x (P,), gate_logit (N,), lengths
    (R,); ``own`` are this batch's counts, ``counts`` those that the means divide by.
    """

    def mean(total: Tensor, count: float | Tensor) -> Tensor:
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))

    chosen, rejected = pair_logps
    pairs = own.pairs
    both = (lengths[:pairs], lengths[pairs : 2 * pairs])
    reduce = PREFERENCE_REDUCTIONS[options.pref_reduction]
    rewards = [options.beta_r * reduce(x, n) for x, n in zip(pair_logps, both, strict=True)]
    margin = rewards[0] - rewards[1] - options.gamma
    # Two empty responses say nothing: without this their constant loss would be reported.
    losses = pair_loss(margin, options.label_smoothing).masked_fill(both[0] + both[1] == 0, 0.0)
    entropy = gate_entropy(gate_logit)

    lm_loss = mean(-lm_sum, LM_REDUCTIONS[options.lm_reduction](counts))
    preference_loss = mean(losses.sum(), counts.pairs)
    regularizer = GATE_REGULARIZERS[options.gate_regularizer]
    gate_loss = options.lambda_g * regularizer(mean(entropy.sum(), counts.tokens))
    loss = lm_loss + options.lambda_r * preference_loss + gate_loss

    with torch.no_grad():
        alpha = torch.sigmoid(gate_logit.double())
        sums = (
            lm_sum.neg(),
            losses.sum(),
            chosen.sum(),
            rejected.sum(),
            rewards[0].sum(),
            rewards[1].sum(),
            (rewards[0] > rewards[1]).sum(),
            (margin.abs() > SATURATION_LOGIT).sum(),
            alpha.sum(),
            alpha.square().sum(),
            entropy.sum(),
            (gate_logit.abs() > SATURATION_LOGIT).sum(),
        )
        own_counts = (own.sequences, own.lm_tokens, own.pairs, own.tokens)
        totals = torch.cat(
            (
                torch.tensor(own_counts, dtype=torch.float64, device=alpha.device),
                torch.stack([x.double() for x in sums]),
            )
        )
    return DualHeadLossOutput(
        loss,
        lm_loss.detach(),
        preference_loss.detach(),
        gate_loss.detach(),
        chosen.detach(),
        rejected.detach(),
        rewards[0].detach(),
        rewards[1].detach(),
        totals,
    )
