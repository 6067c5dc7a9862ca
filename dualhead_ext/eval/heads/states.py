# SPDX-License-Identifier: Apache-2.0
"""Both heads at the response tokens of given texts, from one pass through the backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...head.controls import Controls
from ...head.mixture import mix_logits, mixing_weight
from ..likelihood import Text, per_token

# Hidden states whose logits are computed at once; each takes a few vectors of size V.
_ROWS = 64
# A progress callback; its argument is the number of items done since the last call.
Done = Callable[[int], Any]


def nobody(count: int) -> None:
    """The callback that reports nothing."""


class Heads:
    """The heads of a gated model, evaluated at hidden states.

    Args:
        model: a :class:`dualhead_ext.DualHeadForCausalLM`.
        objective_weights: (K,); default 1/K each.
    Raises:
        NotImplementedError: the backbone changes its logits in a way that its config does not say.
    """

    def __init__(self, model: Any, objective_weights: Sequence[float] | None = None) -> None:
        head = model.lm_head_module
        if head.knows_f is False:
            raise NotImplementedError(
                f"eval: {type(model).__name__} changes its logits in a way that its config does "
                "not say (logit_scale, logit_softcap), which the figures need"
            )
        self.model, self.head = model, head
        self._weights = None if objective_weights is None else torch.tensor(objective_weights)

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (N, d) -> z_LM and z_RM (N, V), before the backbone's own f."""
        weights = self._weights
        if weights is not None:
            weights = weights.to(hidden.device).expand(len(hidden), -1)
        z_lm = self.head.lm_logits(hidden[:, None])
        return z_lm[:, 0], self.head.reward_logits(hidden[:, None], z_lm, weights)[:, 0]

    def alpha(self, gate_logit: Tensor, strength: float = 1.0) -> Tensor:
        """gate_logit (N,) -> alpha (N,), the weight of the reward head."""
        controls = Controls(strength=torch.tensor(strength, device=gate_logit.device))
        return mixing_weight(gate_logit, controls, self.head.config.mix)[1]

    def log_probs(self, z_lm: Tensor, z_rm: Tensor, alpha: Tensor) -> Tensor:
        """The mixture's log-probabilities (N, V); alpha (N,), 0 for pi_LM, 1 for pi_r."""
        config = self.head.config
        post = (config.mix, config.logit_scale, config.logit_softcap)
        return mix_logits(z_lm, z_rm, alpha, *post).double().log_softmax(-1)

    @torch.no_grad()
    def read(
        self,
        texts: Sequence[Text],
        figures: Callable[[Tensor, Tensor, Tensor], Tensor],
        batch_size: int = 8,
        done: Done = nobody,
    ) -> list[Tensor]:
        """Apply ``figures`` to the hidden states that predict each text's response tokens.

        Args:
            figures: (hidden (N, d), gate_logit (N,), the tokens that follow (N,)) -> (N, c).
            done: called with the number of texts after each batch.
        Returns:
            (n, c) for each text, float64 on the CPU.
        """

        def of_batch(ids: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
            states = self.model.training_hidden_states(input_ids=ids, attention_mask=mask)
            gate_logit = self.head.gate(states, mask)[:, :-1][scored]
            parts = (states[:, :-1][scored], gate_logit, ids[:, 1:][scored])
            split = zip(*(part.split(_ROWS) for part in parts), strict=True)
            values = torch.cat([figures(*part).double() for part in split])
            done(len(ids))
            return values

        return per_token(of_batch, self.model.device, texts, batch_size, "right")


def picked(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The value at each row's token: log_probs (N, V), tokens (N,) -> (N,)."""
    return log_probs.gather(-1, tokens[:, None])[:, 0]
