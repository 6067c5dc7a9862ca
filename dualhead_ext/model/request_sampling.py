# SPDX-License-Identifier: Apache-2.0
"""Sampling in continuous batching, where each request has its own filters and seed.

transformers draws all tokens of a batch from one generator, so a sampled text there depends on the
other requests. Here token n of a request depends only on its seed, n and its distribution, as in
``generate(seeds=...)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from ..head.controls import Sampling
from ..head.token_choice import sample_token

SEED = "seed"


class RequestSampling(ContinuousBatchingLogitsProcessor):
    """Chooses the token of each request that has a seed, and makes its logit infinite, since
    transformers takes the argmax afterwards. The logits of other requests stay: they are greedy.
    """

    # Their types and ranges are checked before a request is queued.
    supported_kwargs = dict.fromkeys((*Sampling.FILTERS, SEED), object)
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._states: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing: the settings are read from the requests."""

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Remember the requests of the next batch, in the order of its logits."""
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores (N, V): the logits of the requests, and of others that are never read."""
        found = [(i, s) for i, s in enumerate(self._states) if SEED in s.logit_processor_kwargs]
        if not found:
            return scores
        rows = torch.tensor([i for i, _ in found], device=scores.device)
        given = [state.logit_processor_kwargs for _, state in found]
        filters: dict[str, Any] = {}
        for name, off in Sampling.FILTERS.items():
            values = [own.get(name, off) for own in given]
            if any(value != off for value in values):
                kind = torch.int32 if name == "top_k" else scores.dtype
                filters[name] = torch.tensor(values, dtype=kind, device=scores.device)
        seeds = torch.tensor([own[SEED] for own in given], device=scores.device)
        draws = torch.tensor([_written(state) for _, state in found], device=scores.device)
        tokens = sample_token(scores[rows], seeds, draws, **filters)
        return scores.index_put((rows, tokens), scores.new_tensor(torch.inf))


def _written(state: Any) -> int:
    """The number of tokens that a request has generated. After an eviction, some of them are part
    of its prompt.
    """
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return len(state.initial_tokens) - prompt + state.generated_len()
