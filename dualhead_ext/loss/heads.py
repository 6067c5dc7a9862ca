# SPDX-License-Identifier: Apache-2.0
"""The weights of both heads, as the training loss reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.logits import accumulator_dtype


@dataclass
class Heads:
    """The weights of both heads, and the objectives' weights (K,), or None for 1/K each.

    lm_weight (V, d), lm_bias (V,). For ``reward_head="full"``: reward_weight (K, V, d), reward_bias
    (K, V) or None. For a correction: reward_down (K, r, d) and reward_up (K, n, r), both None for
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
        """The weights of the K reward heads in the mixture."""
        if self.objective_weights is None:
            return [1.0 / self.num_objectives] * self.num_objectives
        return self.objective_weights.tolist()

    def features(self, hidden: Tensor) -> Tensor:
        """The features that a correction multiplies by its matrix with V rows, in fp32 or float64:
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
