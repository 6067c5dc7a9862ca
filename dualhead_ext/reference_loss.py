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
    ALPHA_BINS,
    GATE_REGULARIZERS,
    GATE_STATISTICS,
    LM_REDUCTIONS,
    PREFERENCE_REDUCTIONS,
    SATURATION_LOGIT,
    TOTAL_NAMES,
    DualHeadLossOutput,
    LossCounts,
    LossOptions,
    at_least_one,
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
        weights = self.objective_weights
        weights = None if weights is None else weights.to(hidden.device)[None]
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


@dataclass
class RowSums:
    """Sums over each row's response tokens: all (R,)."""

    lm_nll: Tensor
    pair_logps: Tensor
    entropy: Tensor
    length: Tensor


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
    lengths: list[int] | None = None,
) -> DualHeadLossOutput:
    """The objective over checked arguments, which :func:`dualhead_ext.functional.dual_head_loss`
    documents. Differentiable with respect to hidden, gate_logit and the heads' weights. lengths:
    not needed here, counted from the mask.
    """
    num_rows, length = mask.shape
    rows, columns = mask.bool().nonzero(as_tuple=True)
    if objective is None:
        objective = torch.zeros(num_pairs, dtype=torch.long, device=rows.device)
    objective = objective.to(rows.device)
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
    lm_logps, pair_logps = [], []
    for i, (start, end) in enumerate(pairwise(cuts)):
        part = kept[slice(start, end)]
        lm, pref = _part_log_probs(part, heads, options, in_lm[i], in_pairs=i < 2)
        empty = part.gate_logit.new_zeros(end - start)
        lm_logps.append(empty if lm is None else lm)
        pair_logps.append(empty if pref is None else pref)

    def sums(of_tokens: Tensor) -> Tensor:
        """(N,) -> (R,), in a fixed order."""
        dense = of_tokens.new_zeros(num_rows, length)
        return dense.index_put((rows, columns), of_tokens).sum(-1)

    per_row = RowSums(
        lm_nll=-sums(torch.cat(lm_logps)),
        pair_logps=sums(torch.cat(pair_logps)),
        entropy=sums(gate_entropy(kept.gate_logit)),
        length=mask.bool().sum(-1),
    )
    gate_sums = {name: sums(x) for name, x in gate_statistics(kept.gate_logit).items()}
    return combine(per_row, gate_sums, num_pairs, counts, options)


@torch.no_grad()
def gate_statistics(gate_logit: Tensor) -> dict[str, Tensor]:
    """`losses.GATE_STATISTICS` of each token: (N,) float64 each."""
    alpha = torch.sigmoid(gate_logit.double())
    # Kept as numbers, not indices: a NaN is then in no bin.
    place = (alpha * ALPHA_BINS).floor().clamp(max=ALPHA_BINS - 1)
    ends = (gate_logit < -SATURATION_LOGIT, gate_logit > SATURATION_LOGIT)
    bins = (place == i for i in range(ALPHA_BINS))
    flags = [flag.double() for flag in (*ends, *bins)]
    return dict(zip(GATE_STATISTICS, (alpha, alpha.square(), *flags), strict=True))


def combine(
    sums: RowSums,
    gate_sums: dict[str, Tensor],
    num_pairs: int,
    counts: LossCounts | None,
    options: LossOptions,
) -> DualHeadLossOutput:
    """The three terms and their sum. gate_sums: `losses.GATE_STATISTICS`, (R,) each."""
    own = LossCounts.of_lengths(sums.length, num_pairs, options.lm_on_chosen)
    counts = own if counts is None else counts

    def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:num_pairs], rows[num_pairs : 2 * num_pairs]

    reduce = PREFERENCE_REDUCTIONS[options.pref_reduction]
    chosen_logps, rejected_logps = pairs(sums.pair_logps)
    chosen, rejected = pairs(options.beta_r * reduce(sums.pair_logps, sums.length))
    margin = chosen - rejected - options.gamma
    # Two empty responses say nothing: without this their constant loss would be reported.
    losses = pair_loss(margin, options.label_smoothing)
    losses = losses.masked_fill(sum(pairs(sums.length)) == 0, 0.0)

    lm_count = LM_REDUCTIONS[options.lm_reduction](counts)
    lm_loss = sums.lm_nll.sum() / at_least_one(lm_count)
    preference_loss = losses.sum() / at_least_one(counts.pairs)
    regularizer = GATE_REGULARIZERS[options.gate_regularizer]
    gate_loss = options.lambda_g * regularizer(sums.entropy.sum() / at_least_one(counts.tokens))
    loss = lm_loss + options.lambda_r * preference_loss + gate_loss

    with torch.no_grad():
        of_pairs = {
            "pairs": torch.ones_like(losses),
            "pair_loss": losses,
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "correct_pairs": chosen > rejected,
            "saturated_pairs": margin.abs() > SATURATION_LOGIT,
        }
        in_lm = torch.ones_like(sums.length, dtype=torch.bool)
        in_lm[num_pairs if options.lm_on_chosen else 0 : 2 * num_pairs] = False
        of_rows = {
            "sequences": in_lm,
            "lm_tokens": sums.length * in_lm,
            "tokens": sums.length,
            "lm_nll": sums.lm_nll,
            "entropy": sums.entropy,
            **gate_sums,
        }
        totals = _totals(of_pairs, of_rows, num_pairs)
    rest = (chosen_logps, rejected_logps, chosen, rejected)
    terms = (lm_loss, preference_loss, gate_loss)
    return DualHeadLossOutput(loss, *(x.detach() for x in (*terms, *rest)), totals)


def _totals(of_pairs: dict[str, Tensor], of_rows: dict[str, Tensor], num_pairs: int) -> Tensor:
    """(E, len(TOTAL_NAMES)) float64: an example is a pair, both its rows, or a row after the
    pairs. of_pairs (P,) each, of_rows (R,) each.
    """
    columns = []
    for name in TOTAL_NAMES:
        if name in of_pairs:
            extra = of_rows["tokens"].shape[0] - 2 * num_pairs
            columns.append(F.pad(of_pairs[name].double(), (0, extra)))
        else:
            rows = of_rows[name].double()
            both = rows[:num_pairs] + rows[num_pairs : 2 * num_pairs]
            columns.append(torch.cat((both, rows[2 * num_pairs :])))
    return torch.stack(columns, dim=-1)
