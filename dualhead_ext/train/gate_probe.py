# SPDX-License-Identifier: Apache-2.0
"""A probe of the mixture's KL from the backbone, on hidden states of a few responses. The objective
itself computes the KL only with ``kl_price``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..data.collate import texts_of
from ..head.calibration import mean_kl
from ..model.shards import whole_heads

# The number of hidden states, and the most rows that are read to get them.
STATES, ROWS = 64, 16


class GateProbe:
    """Measures the mixture at strength 1 on the first ``count`` hidden states that predict tokens
    of responses.

    Args:
        model: a :class:`dualhead_ext.DualHeadForCausalLM`.
        rows: tokenised rows of one of the trainer's datasets.
    """

    def __init__(self, model: Any, rows: Any, count: int = STATES) -> None:
        self._model = model
        texts = (text for index in range(min(len(rows), ROWS)) for text in texts_of(rows[index]))
        with whole_heads(model):
            self._texts = list(response_states(model, texts, count))

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        """(KL in nats per token, mean alpha) with the current heads."""
        head = self._model.lm_head_module
        hidden, gate_logit = [], []
        with whole_heads(self._model):
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
    """For each text (ids, mask): all its hidden states (1, T, d), and the positions that predict a
    token of the response. Ends after ``count`` positions.
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
