# SPDX-License-Identifier: Apache-2.0
"""The training loss in eager PyTorch, as fast as plain operators make it: the baseline that the
benchmarks compare with.

It is `loss.reference` up to the sums of each row, where its time goes, and ends as
`loss.chunked` does, by operations on whole batches.
"""

from __future__ import annotations

from torch import Tensor

from ..loss import reference
from ..loss.heads import Heads
from ..loss.pairs import Pairing
from ..loss.terms import GATE_STATISTICS, DualHeadLossOutput, LossCounts, LossOptions
from ..loss.totals import RowSums, combine


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
    """As `loss.reference.dual_head_loss`."""
    of_rows, rewards = reference.row_sums(hidden, labels, mask, gate_logit, heads, options, pairing)
    names = ("lm_nll", "entropy", "kl", "reward_squares", "tokens")
    lm_nll, entropy, kl, squares, tokens = (of_rows[name] for name in names)
    sums = RowSums(lm_nll, rewards, entropy, kl, squares, tokens)
    gate_sums = {name: of_rows[name] for name in GATE_STATISTICS}
    return combine(sums, gate_sums, pairing, counts, options)
