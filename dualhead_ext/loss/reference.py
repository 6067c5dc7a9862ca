# SPDX-License-Identifier: Apache-2.0
"""The training objective in plain PyTorch: the definition of `functional.dual_head_loss`.

    L_LM   = -E_{(x,y)} sum_t log P(y_t | x, y_<t)                     P the mixture
    L_pref = -E log sigmoid(beta_r (r(y+) - r(y-)) - gamma)
    L_gate = -lambda_G E_t[H(a_t)]
    L_KL   = eta E_t[KL(pi_mix,t || pi_LM,t)]
    L      = L_LM + lambda_R L_pref + L_gate + L_KL

    r(y) = sum_t log pi_r(y_t)               preference="log_prob"
    r(y) = sum_t a_t^kappa delta_t(y_t)      preference="token_reward", delta = z_RM - z_LM

Written to be checked by reading. The products are computed for all response tokens at once; then
the code goes pair by pair and example by example. R rows, P pairs (`pairs`), N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import accumulator_dtype, head_logits, postprocess, reward_logits
from .heads import Heads
from .pairs import Pairing, to_device
from .terms import (
    ALPHA_BINS,
    GATE_REGULARIZERS,
    GATE_STATISTICS,
    LM_REDUCTIONS,
    PREFERENCE_REDUCTIONS,
    TOTAL_NAMES,
    DualHeadLossOutput,
    LossCounts,
    LossOptions,
    at_least_one,
)


def lm_logits(heads: Heads, hidden: Tensor) -> Tensor:
    """z_LM (N, V) of hidden (N, d)."""
    return head_logits(hidden.to(heads.lm_weight.dtype), heads.lm_weight, heads.lm_bias)


def mixture_logits(heads: Heads, hidden: Tensor, z_lm: Tensor) -> Tensor:
    """z_RM (N, V) of the mixture: sum_k w_k z_k, or z_LM + sum_k w_k delta_k for a correction."""
    if heads.reward_head == "full":
        hidden = hidden.to(heads.reward_weight.dtype)
        weights = heads.objective_weights
        weights = None if weights is None else weights.to(hidden.device)[None]
        return reward_logits(hidden, heads.reward_weight, heads.reward_bias, weights)
    for k, share in enumerate(heads.shares()):
        z_lm = z_lm + share * correction(heads, hidden, k)
    return z_lm


def objective_logits(heads: Heads, hidden: Tensor, k: int, z_lm: Tensor | None) -> Tensor:
    """z_k (N, V), the logits of one objective's head. z_lm: z_LM if known."""
    if heads.reward_head == "full":
        bias = None if heads.reward_bias is None else heads.reward_bias[k]
        hidden = hidden.to(heads.reward_weight.dtype)
        return head_logits(hidden, heads.reward_weight[k], bias)
    return (lm_logits(heads, hidden) if z_lm is None else z_lm) + correction(heads, hidden, k)


def correction(heads: Heads, hidden: Tensor, k: int) -> Tensor:
    """delta_k (N, V) of a correction: ``W_LM (U_k D_k h + c_k)`` for "embedding", ``U_k D_k h +
    c_k`` for "lowrank". Products run in fp32 or float64; the one with V rows runs in the dtype of
    its weight.
    """
    dtype = accumulator_dtype(hidden.dtype)
    c_k, inner = heads.reward_bias[k].to(dtype), None
    if heads.reward_down is not None:
        inner = hidden.to(dtype) @ heads.reward_down[k].to(dtype).T
    if heads.reward_head == "lowrank":
        up = heads.reward_up[k]
        return head_logits(inner.to(up.dtype), up, None) + c_k
    change = c_k.expand(len(hidden), -1)
    if inner is not None:
        change = inner @ heads.reward_up[k].to(dtype).T + c_k
    return head_logits(change.to(heads.lm_weight.dtype), heads.lm_weight, None)


def token_rewards(heads: Heads, hidden: Tensor, labels: Tensor) -> Tensor:
    """delta_k(y) = z_k[y] - z_LM[y], (K, N) in fp32 or float64."""
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.token_rewards(
            hidden,
            labels,
            heads.lm_weight,
            heads.lm_bias,
            reward_head=heads.reward_head,
            reward_weight=heads.reward_weight,
            reward_down=heads.reward_down,
            reward_up=heads.reward_up,
            reward_bias=heads.reward_bias,
        )


@dataclass
class Part:
    """Some response tokens: rows, labels, gate_logit (N,); hidden (N, d)."""

    rows: Tensor
    hidden: Tensor
    labels: Tensor
    gate_logit: Tensor

    def __getitem__(self, index: Tensor) -> Part:
        return Part(*(x[index] for x in (self.rows, self.hidden, self.labels, self.gate_logit)))


def entropy(gate_logit: Tensor) -> Tensor:
    """``H(a)`` of ``a = sigmoid(l)``: a Bernoulli variable's cross-entropy with itself. Infinite
    logits (a fixed a of 0 or 1) give 0 and no gradient.
    """
    logit = torch.where(torch.isinf(gate_logit), 0.0, gate_logit)
    own = F.binary_cross_entropy_with_logits(logit, torch.sigmoid(logit), reduction="none")
    return torch.where(torch.isinf(gate_logit), 0.0, own)


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """``log softmax(z)_y``: logits (N, V) fp32 or float64, labels (N,) -> (N,)."""
    return -F.cross_entropy(logits, labels.long(), reduction="none")


def mixed_log_probs(
    z_lm: Tensor, z_rm: Tensor, gate_logit: Tensor, labels: Tensor, options: LossOptions
) -> Tensor:
    """``log P(y)`` of the mixture: z_lm, z_rm (N, V), gate_logit l, labels (N,) -> (N,).

    logits: ``log softmax(f(sigmoid(-l) z_LM + sigmoid(l) z_RM))_y``. probs: ``logaddexp(logsigmoid
    (-l) + log softmax(f(z_LM))_y, logsigmoid(l) + log softmax(f(z_RM))_y)``. Both are exact for a
    saturated alpha. A share of exactly 0 selects the other head.
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


def mixed_kl(z_lm: Tensor, z_rm: Tensor, gate_logit: Tensor, options: LossOptions) -> Tensor:
    """``KL(pi_mix || pi_LM)`` in nats: z_lm, z_rm (N, V), gate_logit (N,) -> (N,). 0 where alpha is
    exactly 0.
    """
    post = (options.logit_scale, options.logit_softcap)
    lm = torch.log_softmax(postprocess(z_lm, *post), -1)
    lm_share, rm_share = torch.sigmoid(-gate_logit)[:, None], torch.sigmoid(gate_logit)[:, None]
    lm_only, rm_only = rm_share == 0, lm_share == 0
    if options.mix == "logits":
        mixed = torch.where(rm_only, z_rm, lm_share * z_lm + rm_share * z_rm)
        mixed = torch.log_softmax(postprocess(mixed, *post), -1)
    else:
        rm = torch.log_softmax(postprocess(z_rm, *post), -1)
        # An infinite logit is handled by the selection below, and kept out of the graph.
        logit = gate_logit.masked_fill(torch.isinf(gate_logit), 0.0)[:, None]
        mixed = torch.logaddexp(F.logsigmoid(-logit) + lm, F.logsigmoid(logit) + rm)
        mixed = torch.where(rm_only, rm, mixed)
    mixed = torch.where(lm_only, lm, mixed)
    # A token of probability 0 adds nothing; log 0 - log 0 would be NaN.
    absent = mixed == -torch.inf
    ratio = (mixed - lm).masked_fill(absent, 0.0)
    return (mixed.exp() * ratio).sum(-1)


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
    pairing: Pairing,
    counts: LossCounts | None = None,
    lengths: list[int] | None = None,
) -> DualHeadLossOutput:
    """The objective over checked arguments; :func:`dualhead_ext.functional.dual_head_loss`
    documents them. Differentiable with respect to hidden, gate_logit and the heads' weights.
    lengths: not used; they are counted from the mask.
    """
    sums = row_sums(hidden, labels, mask, gate_logit, heads, options, pairing)
    return objective(*sums, pairing, counts, options)


def row_sums(
    hidden: Tensor,
    labels: Tensor,
    mask: Tensor,
    gate_logit: Tensor,
    heads: Heads,
    options: LossOptions,
    pairing: Pairing,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over each row's response tokens: (``lm_nll``, ``entropy``, ``kl``, ``reward_squares``,
    ``tokens`` and `terms.GATE_STATISTICS`, (R,) each; r under each objective's head (R, K)).
    """
    num_rows, length = mask.shape
    rows, columns = mask.bool().nonzero(as_tuple=True)
    kept = Part(
        rows, hidden[rows, columns], labels[rows, columns].long(), gate_logit[rows, columns]
    )
    in_lm = to_device(pairing.in_lm(options.lm_on_chosen), rows.device)
    lm_logps = torch.zeros_like(kept.gate_logit)
    kl = torch.zeros_like(kept.gate_logit)
    squares = torch.zeros_like(kept.gate_logit)
    rewards = kept.gate_logit.new_zeros(heads.num_objectives, len(rows))
    if options.preference == "token_reward":
        alpha = torch.sigmoid(kept.gate_logit)
        rewards = token_rewards(heads, kept.hidden, kept.labels)
        if options.reward_l2:
            squares = sum(of_objective**2 for of_objective in rewards)
        rewards = rewards * alpha**options.pref_gate
    for in_term in (True, False):
        index = (in_lm[rows] == in_term).nonzero().squeeze(-1)
        part = kept[index]
        log_prob = options.preference == "log_prob"
        needs_mixture = in_term or options.kl_price > 0.0
        z_lm = z_rm = None
        if needs_mixture or (log_prob and options.pref_on == "mixed"):
            z_lm = lm_logits(heads, part.hidden)
        if needs_mixture:
            z_rm = mixture_logits(heads, part.hidden, z_lm)
        lm = None
        if in_term:
            lm = mixed_log_probs(z_lm, z_rm, part.gate_logit, part.labels, options)
            lm_logps = lm_logps.index_put((index,), lm)
        if options.kl_price > 0.0:
            kl = kl.index_put((index,), mixed_kl(z_lm, z_rm, part.gate_logit, options))
        if log_prob:
            rewards = _log_prob_rewards(
                rewards, part, index, z_lm, z_rm, lm, heads, options, pairing
            )

    def sums(of_tokens: Tensor) -> Tensor:
        """(N,) -> (R,), in a fixed order."""
        dense = of_tokens.new_zeros(num_rows, length)
        return dense.index_put((rows, columns), of_tokens).sum(-1)

    per_token = {"lm_nll": -lm_logps, "entropy": entropy(kept.gate_logit), "kl": kl}
    per_token["reward_squares"] = squares
    per_row = {name: sums(x) for name, x in (per_token | _of_alpha(kept.gate_logit)).items()}
    per_row["tokens"] = mask.bool().sum(-1)
    of_rewards = torch.stack([sums(of_objective) for of_objective in rewards], dim=-1)
    return per_row, of_rewards


def _log_prob_rewards(
    rewards: Tensor,
    part: Part,
    index: Tensor,
    z_lm: Tensor | None,
    z_rm: Tensor | None,
    lm: Tensor | None,
    heads: Heads,
    options: LossOptions,
    pairing: Pairing,
) -> Tensor:
    """rewards (K, N) with the log-probabilities of a part's tokens filled in where a pair needs
    them: under pi_r of the pair's objective, or under that objective's mixture. Results that exist
    already (z_lm, z_rm of the mixture, lm its log-probabilities) are used again.
    """
    one = heads.num_objectives == 1 and heads.objective_weights is None
    for k in range(heads.num_objectives):
        acts = [p for p, of_pair in enumerate(pairing.objective) if of_pair == k]
        compared = torch.cat(pairing.tensors(index.device, acts)[:2])
        chosen = torch.isin(part.rows, compared).nonzero().squeeze(-1)
        if not len(chosen):
            continue
        tokens = part[chosen]
        known = None if z_lm is None else z_lm[chosen]
        z_k = z_rm[chosen] if one and z_rm is not None else None
        z_k = objective_logits(heads, tokens.hidden, k, known) if z_k is None else z_k
        if options.pref_on == "reward":
            logps = _reward_log_probs(z_k, tokens.labels, options)
        elif one and lm is not None:
            logps = lm[chosen]
        else:
            logps = mixed_log_probs(known, z_k, tokens.gate_logit, tokens.labels, options)
        position = torch.full_like(chosen, k), index[chosen]
        rewards = rewards.index_put(position, logps.to(rewards.dtype))
    return rewards


@torch.no_grad()
def _of_alpha(gate_logit: Tensor) -> dict[str, Tensor]:
    """`terms.GATE_STATISTICS` of each token: (N,) float64 each."""
    alpha = torch.sigmoid(gate_logit.double())
    found = {"alpha": alpha, "alpha_squared": alpha**2}
    found["alpha_near_0"] = alpha < 0.01
    found["alpha_near_1"] = alpha > 0.99
    for i in range(ALPHA_BINS):
        below_end = alpha < (i + 1) / ALPHA_BINS if i + 1 < ALPHA_BINS else alpha <= 1
        found[f"alpha_bin_{i}"] = (alpha >= i / ALPHA_BINS) & below_end
    return {name: found[name].double() for name in GATE_STATISTICS}


_SIDES = ("chosen", "rejected")

# The values of each pair, in the order of `objective`.
_OF_PAIRS = (
    "pairs",
    "pair_loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "correct_pairs",
    "saturated_pairs",
)


def objective(
    per_row: dict[str, Tensor],
    rewards: Tensor,
    pairing: Pairing,
    counts: LossCounts | None,
    options: LossOptions,
) -> DualHeadLossOutput:
    """L from the sums of each row: per_row (R,) each, rewards (R, K). It goes pair by pair and
    example by example.
    """
    length = per_row["tokens"]
    counts = counts or LossCounts.of_lengths(length, pairing, options.lm_on_chosen)
    e, reduce = options.label_smoothing, PREFERENCE_REDUCTIONS[options.pref_reduction]
    pair_rows = []
    for better, worse, k in zip(pairing.better, pairing.worse, pairing.objective, strict=True):
        r_better, r_worse = rewards[better, k], rewards[worse, k]
        chosen = options.beta_r * reduce(r_better, length[better])
        rejected = options.beta_r * reduce(r_worse, length[worse])
        margin = chosen - rejected - options.gamma
        pair_loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        # Two empty responses carry no information.
        pair_loss = torch.where(length[better] + length[worse] == 0, 0.0, pair_loss)
        p_right = torch.sigmoid(margin.detach().double())
        saturated = (p_right < 0.01) | (p_right > 0.99)
        flags = ((chosen > rejected).to(margin.dtype), saturated.to(margin.dtype))
        values = (pair_loss, r_better, r_worse, chosen, rejected, *flags)
        pair_rows.append(torch.stack((torch.ones_like(margin), *values)))
    none = rewards.new_zeros(0, len(_OF_PAIRS))
    of_pairs = torch.stack(pair_rows) if pair_rows else none
    by_name = dict(zip(_OF_PAIRS, of_pairs.unbind(-1), strict=True))

    lm_loss = per_row["lm_nll"].sum() / at_least_one(LM_REDUCTIONS[options.lm_reduction](counts))
    preference_loss = by_name["pair_loss"].sum() / at_least_one(counts.pairs)
    mean_entropy = per_row["entropy"].sum() / at_least_one(counts.tokens)
    gate_loss = options.lambda_g * GATE_REGULARIZERS[options.gate_regularizer](mean_entropy)
    kl_loss = options.kl_price * per_row["kl"].sum() / at_least_one(counts.tokens)
    mean_square = per_row["reward_squares"].sum() / at_least_one(counts.tokens)
    l2_loss = options.reward_l2 * mean_square / 2
    loss = lm_loss + options.lambda_r * preference_loss + gate_loss + kl_loss + l2_loss

    in_lm = to_device(pairing.in_lm(options.lm_on_chosen), length.device)
    per_row = per_row | {"sequences": in_lm, "lm_tokens": length * in_lm}
    of_rows = torch.stack([values.detach().double() for values in per_row.values()], dim=-1)
    totals = []
    for rows, pairs in zip(pairing.examples, pairing.pairs_of_examples, strict=True):
        sums = torch.cat((of_rows[rows].sum(0), of_pairs[pairs].detach().double().sum(0)))
        named = dict(zip((*per_row, *_OF_PAIRS), sums, strict=True))
        totals.append(torch.stack([named[name] for name in TOTAL_NAMES]))
    compared = (by_name[f"{side}_{kind}"] for kind in ("logps", "rewards") for side in _SIDES)
    detached = (
        lm_loss,
        preference_loss,
        gate_loss,
        kl_loss,
        l2_loss,
        *compared,
        torch.stack(totals),
    )
    return DualHeadLossOutput(loss, *(x.detach() for x in detached))
