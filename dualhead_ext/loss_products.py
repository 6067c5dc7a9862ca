# SPDX-License-Identifier: Apache-2.0
"""The fused loss's matrix products: some tokens' logits, and what their gradients mean for weights,
biases and hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import accumulator_dtype
from .reference_loss import Heads

# Vocabulary rows of a low-precision product that is widened afterwards.
VOCABULARY_BLOCK = 2048


@dataclass
class Tokens:
    """The N response tokens, row-major: rows, labels, gate_logit (N,), hidden (N, d)."""

    rows: Tensor
    labels: Tensor
    gate_logit: Tensor
    hidden: Tensor


@dataclass
class Job:
    """Logits of some tokens and what is wanted of them.

    Attributes:
        index: (n,) which tokens.
        reward: the objectives (k, w_k) that make z_RM = sum_k w_k z_k.
        in_lm, in_pairs: the terms that these tokens' log-probabilities go into.
        pairs_mixed: the preference term takes the mixture's, too.
    """

    index: Tensor
    reward: list[tuple[int, float]]
    in_lm: bool
    in_pairs: bool
    pairs_mixed: bool

    @property
    def mixes(self) -> bool:
        return self.in_lm or (self.in_pairs and self.pairs_mixed)


class Products:
    """Products with the heads' weights, into fp32 (float64), and their gradients.

    A weight's product runs in its own dtype or autocast's. Narrow results are widened a block of
    `VOCABULARY_BLOCK` rows at a time. Gradients of weights are summed in the accumulator's dtype.
    """

    def __init__(self, tokens: Tokens, heads: Heads, wanted: dict[str, bool]) -> None:
        device = tokens.hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self._narrow = torch.get_autocast_dtype(device) if autocast else None
        self._tokens, self.dtype = tokens, accumulator_dtype(tokens.hidden.dtype)
        self._weights = {"lm": heads.lm_weight[None], "reward": heads.reward_weight}
        self._biases = {
            "lm": None if heads.lm_bias is None else heads.lm_bias[None],
            "reward": heads.reward_bias,
        }
        self._casts: dict[tuple[str, int], Tensor] = {}

        def sums(name: str, like: Tensor | None) -> Tensor | None:
            if like is None or not wanted[name]:
                return None
            return torch.zeros(like.shape, dtype=self.dtype, device=like.device)

        self.weight_grads = {n: sums(f"{n}_weight", w) for n, w in self._weights.items()}
        self.bias_grads = {n: sums(f"{n}_bias", b) for n, b in self._biases.items()}
        self.hidden_grad = sums("hidden", tokens.hidden)

    def _weight(self, name: str, k: int) -> Tensor:
        """(V, d) in the product's dtype; autocast's copy is made once for the whole loss."""
        weight = self._weights[name][k]
        if self._narrow is None or weight.dtype in (self._narrow, torch.float64):
            return weight
        key = (name, k)
        if key not in self._casts:
            self._casts[key] = weight.to(self._narrow)
        return self._casts[key]

    def logits(self, job: Job, name: str) -> Tensor:
        """z_LM or z_RM of a job (n, V), fresh."""
        terms = [(0, 1.0)] if name == "lm" else job.reward
        out = None
        for k, share in terms:
            weight = self._weight(name, k)
            hidden = self._tokens.hidden[job.index].to(weight.dtype)
            z = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=self.dtype)
            if weight.dtype == self.dtype:
                torch.mm(hidden, weight.T, out=z)
            else:
                for block in _blocks(weight.shape[0]):
                    z[:, block] = hidden @ weight[block].T
            if self._biases[name] is not None:
                z += self._biases[name][k].to(self.dtype)
            if share != 1.0:
                z *= share
            out = z if out is None else out.add_(z)
        return out

    def accumulate(self, job: Job, name: str, dz: Tensor) -> None:
        """Add what dz (n, V) means for the weights, biases and hidden states."""
        for k, share in [(0, 1.0)] if name == "lm" else job.reward:
            weight = self._weight(name, k)
            total, bias = self.weight_grads[name], self.bias_grads[name]
            hidden = self._tokens.hidden[job.index].to(weight.dtype)
            if bias is not None:
                bias[k] += share * dz.sum(0)
            if total is not None and weight.dtype == self.dtype:
                total[k].addmm_(dz.T, hidden, alpha=share)
            elif total is not None:
                for block in _blocks(weight.shape[0]):
                    part = dz[:, block].to(weight.dtype).T @ hidden
                    total[k][block].add_(part, alpha=share)
            if self.hidden_grad is not None:
                back = dz.to(weight.dtype) @ weight
                self.hidden_grad.index_add_(0, job.index, back.to(self.dtype), alpha=share)


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, VOCABULARY_BLOCK):
        yield slice(start, min(start + VOCABULARY_BLOCK, size))
