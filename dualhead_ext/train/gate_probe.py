# SPDX-License-Identifier: Apache-2.0
"""A few responses' hidden states, kept, so that a run can say how far the mixture is from the
backbone: the objective itself computes no KL unless that has a price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..data.collate import texts_of
from ..head.calibration import mean_kl

# States that are enough for a line of a log, and rows that are read for them at most.
STATES, ROWS = 64, 16


class GateProbe:
    """The mixture at strength 1 in the first ``count`` states that predict tokens of responses.

    Args:
        model: a :class:`dualhead_ext.DualHeadForCausalLM`.
        rows: tokenised rows, as the trainer's datasets hold them.
    """

    def __init__(self, model: Any, rows: Any, count: int = STATES) -> None:
        self._model = model
        texts = (text for index in range(min(len(rows), ROWS)) for text in texts_of(rows[index]))
        self._texts = list(response_states(model, texts, count))

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        """(KL in nats per token, mean alpha), with the heads as they are now."""
        head = self._model.lm_head_module
        hidden, gate_logit = [], []
        for states, predicts in self._texts:
            hidden.append(states[0, predicts])
            gate_logit.append(head.gate(states)[0, predicts])
        logits = torch.cat(gate_logit)
        kl = mean_kl(head, torch.cat(hidden), logits)
        return float(kl.mean()), float(torch.sigmoid(logits.float()).mean())


@torch.no_grad()
def response_states(
    model: Any, texts: Iterable[tuple[list[int], list[int]]], count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each text (ids, mask), until there are ``count`` states: all its hidden states (1, T, d),
    and the positions that predict a token of the response.
    """
    for ids, mask in texts:
        if count <= 0:
            return
        batch = torch.tensor([ids], device=model.device)
        states = model.training_hidden_states(
            input_ids=batch, attention_mask=torch.ones_like(batch)
        )
        positions = torch.tensor(mask[1:], device=model.device).nonzero()[:, 0][:count]
        if len(positions):
            count -= len(positions)
            yield states, positions
