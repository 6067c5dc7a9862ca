# SPDX-License-Identifier: Apache-2.0
"""The terms of the objective, and the logged totals, from sums over each row's response tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    pair_loss,
)


@dataclass
class RowSums:
    """Sums over each row's response tokens, (R,) each. rewards (R, K): r under each objective's
    head, 0 if no pair needs it. reward_squares: of squared token rewards, over all objectives.
    """

    lm_nll: Tensor
    rewards: Tensor
    entropy: Tensor
    kl: Tensor
    reward_squares: Tensor
    length: Tensor


@torch.no_grad()
def gate_statistics(gate_logit: Tensor) -> dict[str, Tensor]:
    """`terms.GATE_STATISTICS` of each token: (N,) float64 each."""
    alpha = torch.sigmoid(gate_logit.double())
    # Floats, not indices, so that a NaN falls into no bin.
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
    """The terms and their sum. gate_sums: `terms.GATE_STATISTICS`, (R,) each."""
    own = LossCounts.of_lengths(sums.length, pairing, options.lm_on_chosen)
    counts = own if counts is None else counts
    device = sums.length.device
    better, worse, objective = pairing.tensors(device)
    reduce = PREFERENCE_REDUCTIONS[options.pref_reduction]
    logps = [sums.rewards[rows, objective] for rows in (better, worse)]
    lengths = [sums.length[rows] for rows in (better, worse)]
    chosen, rejected = (options.beta_r * reduce(x, n) for x, n in zip(logps, lengths, strict=True))
    margin = chosen - rejected - options.gamma
    # Two empty responses carry no information; their constant loss must not be reported.
    losses = pair_loss(margin, options.label_smoothing)
    losses = losses.masked_fill(lengths[0] + lengths[1] == 0, 0.0)

    lm_count = LM_REDUCTIONS[options.lm_reduction](counts)
    lm_loss = sums.lm_nll.sum() / at_least_one(lm_count)
    preference_loss = losses.sum() / at_least_one(counts.pairs)
    regularizer = GATE_REGULARIZERS[options.gate_regularizer]
    gate_loss = options.lambda_g * regularizer(sums.entropy.sum() / at_least_one(counts.tokens))
    kl_loss = options.kl_price * (sums.kl.sum() / at_least_one(counts.tokens))
    l2_loss = options.reward_l2 / 2 * (sums.reward_squares.sum() / at_least_one(counts.tokens))
    loss = lm_loss + options.lambda_r * preference_loss + gate_loss + kl_loss + l2_loss

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
            "reward_squares": sums.reward_squares,
            **gate_sums,
        }
        totals = _totals(of_pairs, of_rows, pairing)
    detached = (lm_loss, preference_loss, gate_loss, kl_loss, l2_loss, *logps, chosen, rejected)
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
