# SPDX-License-Identifier: Apache-2.0
"""The training objective in plain PyTorch: the meaning of `functional.dual_head_loss`.

    L_LM   = -E_{(x,y)} sum_t log P(y_t | x, y_<t)                     P the mixture
    L_pref = -E log sigmoid(beta_r (r(y+) - r(y-)) - gamma)
    L_gate = -lambda_G E_t[H(a_t)]
    L_KL   = eta E_t[KL(pi_mix,t || pi_LM,t)]
    L      = L_LM + lambda_R L_pref + L_gate + L_KL

    r(y) = sum_t log pi_r(y_t)               preference="log_prob"
    r(y) = sum_t a_t^kappa delta_t(y_t)      preference="token_reward", delta = z_RM - z_LM

Response tokens alone reach the heads: prompts and padding are dropped before the products. R rows,
P pairs of them (`loss_pairs`), N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import accumulator_dtype, head_logits, postprocess, reward_logits
from .pairs import Pairing, to_device
from .terms import (
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


@dataclass
class Heads:
    """Both heads' weights, and the objectives' weights (K,) or None for 1/K each.

    lm_weight (V, d), lm_bias (V,). Of ``reward_head="full"``: reward_weight (K, V, d), reward_bias
    (K, V) or None. Of a correction: reward_down (K, r, d) and reward_up (K, n, r), both None for
    rank 0, and reward_bias (K, n); n = d for "embedding", V for "lowrank".
    """

    lm_weight: Tensor
    lm_bias: Tensor | None
    reward_weight: Tensor | None
    reward_bias: Tensor | None
    objective_weights: Tensor | None
    reward_head: str = "full"
    reward_down: Tensor | None = None
    reward_up: Tensor | None = None

    @property
    def num_objectives(self) -> int:
        """K."""
        first = self.reward_weight if self.reward_head == "full" else self.reward_bias
        return first.shape[0]

    def shares(self) -> list[float]:
        """The K weights of the mixture's reward."""
        if self.objective_weights is None:
            return [1.0 / self.num_objectives] * self.num_objectives
        return self.objective_weights.tolist()

    def lm(self, hidden: Tensor) -> Tensor:
        """z_LM (N, V)."""
        return head_logits(hidden.to(self.lm_weight.dtype), self.lm_weight, self.lm_bias)

    def reward(self, hidden: Tensor, z_lm: Tensor | None = None) -> Tensor:
        """z_RM (N, V) of the mixture: sum_k w_k z_k, or z_LM + sum_k w_k delta_k."""
        if self.reward_head == "full":
            hidden = hidden.to(self.reward_weight.dtype)
            weights = self.objective_weights
            weights = None if weights is None else weights.to(hidden.device)[None]
            return reward_logits(hidden, self.reward_weight, self.reward_bias, weights)
        total = self.lm(hidden) if z_lm is None else z_lm
        for k, share in enumerate(self.shares()):
            total = total + share * self.correction(hidden, k)
        return total

    def objective(self, hidden: Tensor, k: int, z_lm: Tensor | None = None) -> Tensor:
        """z_k (N, V), the logits of one objective's head."""
        if self.reward_head == "full":
            bias = None if self.reward_bias is None else self.reward_bias[k]
            hidden = hidden.to(self.reward_weight.dtype)
            return head_logits(hidden, self.reward_weight[k], bias)
        return (self.lm(hidden) if z_lm is None else z_lm) + self.correction(hidden, k)

    def correction(self, hidden: Tensor, k: int) -> Tensor:
        """delta_k (N, V) of a head that is a correction: ``W_LM (U_k D_k h + c_k)`` or
        ``B_k A_k h + b_k``.
        """
        inner = self.features(hidden)[k]
        if self.reward_head == "embedding":
            return head_logits(inner.to(self.lm_weight.dtype), self.lm_weight, None)
        bias = self.reward_bias[k].to(inner.dtype)
        return head_logits(inner.to(self.reward_up.dtype), self.reward_up[k], None) + bias

    def features(self, hidden: Tensor) -> Tensor:
        """What the correction's matrix with V rows is multiplied by, in fp32 or float64:
        ``U_k D_k h + c_k`` (K, N, d) for "embedding", ``A_k h`` (K, N, r) for "lowrank".
        """
        dtype = accumulator_dtype(hidden.dtype)
        inner = None
        if self.reward_down is not None:
            inner = hidden.to(dtype) @ self.reward_down.to(dtype).mT
        if self.reward_head == "lowrank":
            return inner
        bias = self.reward_bias.to(dtype)[:, None]
        if inner is None:
            return bias.expand(-1, hidden.shape[0], -1)
        return inner @ self.reward_up.to(dtype).mT + bias

    def token_rewards(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """delta_k(y) = z_k[y] - z_LM[y], (K, N) in fp32 or float64, from the rows of the labels
        alone.
        """
        dtype = accumulator_dtype(hidden.dtype)
        hidden, rows = hidden.to(dtype), F.embedding(labels, self.lm_weight).to(dtype)
        if self.reward_head == "embedding":
            return (self.features(hidden) * rows).sum(-1)
        found = []
        for k in range(self.num_objectives):
            bias = None if self.reward_bias is None else self.reward_bias[k].to(dtype)
            if self.reward_head == "full":
                own = F.embedding(labels, self.reward_weight[k]).to(dtype)
                value = ((own - rows) * hidden).sum(-1)
                bias = None if bias is None else bias - self.lm_bias.to(dtype)
            else:
                own = F.embedding(labels, self.reward_up[k]).to(dtype)
                value = (own * (hidden @ self.reward_down[k].to(dtype).T)).sum(-1)
            found.append(value if bias is None else value + bias[labels])
        return torch.stack(found)


@dataclass
class Part:
    """Some response tokens: rows, labels, gate_logit (N,); hidden (N, d)."""

    rows: Tensor
    hidden: Tensor
    labels: Tensor
    gate_logit: Tensor

    def __getitem__(self, index: Tensor) -> Part:
        return Part(*(x[index] for x in (self.rows, self.hidden, self.labels, self.gate_logit)))


@dataclass
class RowSums:
    """Sums over each row's response tokens: (R,), rewards (R, K): r under each objective's head,
    0 where no pair asks for it.
    """

    lm_nll: Tensor
    rewards: Tensor
    entropy: Tensor
    kl: Tensor
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
        # An infinite logit selects below; it is kept out of the graph.
        logit = gate_logit.masked_fill(torch.isinf(gate_logit), 0.0)[:, None]
        mixed = torch.logaddexp(F.logsigmoid(-logit) + lm, F.logsigmoid(logit) + rm)
        mixed = torch.where(rm_only, rm, mixed)
    mixed = torch.where(lm_only, lm, mixed)
    # A token of probability 0 adds nothing, and log 0 - log 0 must not make it NaN.
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
    """The objective over checked arguments, which :func:`dualhead_ext.functional.dual_head_loss`
    documents. Differentiable with respect to hidden, gate_logit and the heads' weights. lengths:
    not needed here, counted from the mask.
    """
    num_rows, length = mask.shape
    rows, columns = mask.bool().nonzero(as_tuple=True)
    kept = Part(
        rows, hidden[rows, columns], labels[rows, columns].long(), gate_logit[rows, columns]
    )
    in_lm = to_device(pairing.in_lm(options.lm_on_chosen), rows.device)
    lm_logps = torch.zeros_like(kept.gate_logit)
    kl = torch.zeros_like(kept.gate_logit)
    rewards = kept.gate_logit.new_zeros(heads.num_objectives, len(rows))
    if options.preference == "token_reward":
        alpha = torch.sigmoid(kept.gate_logit)
        rewards = heads.token_rewards(kept.hidden, kept.labels) * alpha**options.pref_gate
    for in_term in (True, False):
        index = (in_lm[rows] == in_term).nonzero().squeeze(-1)
        part = kept[index]
        log_prob = options.preference == "log_prob"
        needs_mixture = in_term or options.kl_price > 0.0
        z_lm = z_rm = None
        if needs_mixture or (log_prob and options.pref_on == "mixed"):
            z_lm = heads.lm(part.hidden)
        if needs_mixture:
            z_rm = heads.reward(part.hidden, z_lm)
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

    per_row = RowSums(
        lm_nll=-sums(lm_logps),
        rewards=torch.stack([sums(of_objective) for of_objective in rewards], dim=-1),
        entropy=sums(gate_entropy(kept.gate_logit)),
        kl=sums(kl),
        length=mask.bool().sum(-1),
    )
    gate_sums = {name: sums(x) for name, x in gate_statistics(kept.gate_logit).items()}
    return combine(per_row, gate_sums, pairing, counts, options)


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
    """rewards (K, N) with the log-probabilities of a part's tokens, where a pair needs them: under
    pi_r of its objective, or under that objective's mixture. What the part has computed already
    (z_lm, z_rm of the mixture, lm its log-probabilities) is used again.
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
        z_k = heads.objective(tokens.hidden, k, known) if z_k is None else z_k
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
    pairing: Pairing,
    counts: LossCounts | None,
    options: LossOptions,
) -> DualHeadLossOutput:
    """The terms and their sum. gate_sums: `losses.GATE_STATISTICS`, (R,) each."""
    own = LossCounts.of_lengths(sums.length, pairing, options.lm_on_chosen)
    counts = own if counts is None else counts
    device = sums.length.device
    better, worse, objective = pairing.tensors(device)
    reduce = PREFERENCE_REDUCTIONS[options.pref_reduction]
    logps = [sums.rewards[rows, objective] for rows in (better, worse)]
    lengths = [sums.length[rows] for rows in (better, worse)]
    chosen, rejected = (options.beta_r * reduce(x, n) for x, n in zip(logps, lengths, strict=True))
    margin = chosen - rejected - options.gamma
    # Two empty responses say nothing: without this their constant loss would be reported.
    losses = pair_loss(margin, options.label_smoothing)
    losses = losses.masked_fill(lengths[0] + lengths[1] == 0, 0.0)

    lm_count = LM_REDUCTIONS[options.lm_reduction](counts)
    lm_loss = sums.lm_nll.sum() / at_least_one(lm_count)
    preference_loss = losses.sum() / at_least_one(counts.pairs)
    regularizer = GATE_REGULARIZERS[options.gate_regularizer]
    gate_loss = options.lambda_g * regularizer(sums.entropy.sum() / at_least_one(counts.tokens))
    kl_loss = options.kl_price * (sums.kl.sum() / at_least_one(counts.tokens))
    loss = lm_loss + options.lambda_r * preference_loss + gate_loss + kl_loss

    with torch.no_grad():
        of_pairs = {
            "pairs": torch.ones_like(losses),
            "pair_loss": losses,
            "chosen_logps": logps[0],
            "rejected_logps": logps[1],
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "correct_pairs": chosen > rejected,
            "saturated_pairs": margin.abs() > SATURATION_LOGIT,
        }
        in_lm = to_device(pairing.in_lm(options.lm_on_chosen), device)
        of_rows = {
            "sequences": in_lm,
            "lm_tokens": sums.length * in_lm,
            "tokens": sums.length,
            "lm_nll": sums.lm_nll,
            "entropy": sums.entropy,
            "kl": sums.kl,
            **gate_sums,
        }
        totals = _totals(of_pairs, of_rows, pairing)
    detached = (lm_loss, preference_loss, gate_loss, kl_loss, *logps, chosen, rejected)
    values: list[Any] = [*(x.detach() for x in detached), totals]
    return DualHeadLossOutput(loss, *values)


def _totals(of_pairs: dict[str, Tensor], of_rows: dict[str, Tensor], pairing: Pairing) -> Tensor:
    """(E, len(TOTAL_NAMES)) float64. of_pairs (P,) each, of_rows (R,) each."""
    device = of_rows["tokens"].device
    values = [(of_pairs if name in of_pairs else of_rows)[name].double() for name in TOTAL_NAMES]
    out = torch.zeros(len(pairing.examples), len(TOTAL_NAMES), dtype=torch.float64, device=device)
    members = (pairing.pairs_of_examples, pairing.examples)
    for source, lists in zip((of_pairs, of_rows), members, strict=True):
        columns = [i for i, name in enumerate(TOTAL_NAMES) if (name in source)]
        of_source = torch.stack([values[i] for i in columns], -1)
        out[:, columns] = _sums_of(of_source, lists)
    return out


def _sums_of(values: Tensor, members: list[list[int]]) -> Tensor:
    """Sums of the rows of values (n, m) over each list of rows: (E, m), in a fixed order."""
    longest = max(map(len, members))
    numbers = [n for rows in members for n in (*rows, *[len(values)] * (longest - len(rows)))]
    index = to_device(numbers, values.device).view(len(members), longest)
    padded = torch.cat((values, values.new_zeros(1, values.shape[1])))
    return padded[index].sum(1)
