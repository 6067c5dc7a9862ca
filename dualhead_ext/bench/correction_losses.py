# SPDX-License-Identifier: Apache-2.0
"""The training loss of a correction reward head, forward and backward, compared with that of a full
head: time, and memory beyond the gradients.

- ``full``: a full head trained by log-probabilities with the language model term, as in
  :mod:`.loss`.
- ``embedding``, ``lowrank``: the loss on token rewards alone.
- ``embedding, LM``, ``lowrank, LM``: the same with the language model term.
- ``embedding, KL``, ``lowrank, KL``: the same with a KL price.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..loss import chunked
from ..loss import reference as reference_loss
from ..loss.heads import Heads
from ..loss.pairs import Pairing
from ..loss.terms import LossOptions
from ..measurement.timing import Contender, alternate
from .comparisons import Comparison, Contest, times
from .correction_steps import RANKS, correction
from .loss_cases import LARGEST, LossCase
from .loss_contenders import Batch
from .memory import peak_bytes

# Limits for the loss on token rewards alone, as multiples of the full head's loss.
TIME, MEMORY = 0.05, 0.1
# Further terms of a correction's loss, by the ending of its name.
TERMS: dict[str, dict[str, Any]] = {
    "": {},
    ", LM": {"lm_on_chosen": True},
    ", KL": {"kl_price": 0.1},
}

# Allowed relative difference of a loss and its gradients from the reference's, as in `loss`; by
# autocast.
_TOLERANCE = {True: 5e-2, False: 1e-3}


def plan(quick: bool = False) -> list[LossCase]:
    """The cases to run."""
    if quick:
        return [LossCase(64, 1024, "fp32", tokens=128, pairs=2, compile=False)]
    return [LossCase(*LARGEST, name, compile=False) for name in ("fp32", "bf16")]


class CorrectionLoss:
    """The loss of a correction on a :class:`.loss_contenders.Batch`.

    Attributes:
        leaves: name -> tensor that gets a gradient.
    """

    def __init__(self, batch: Batch, kind: str, terms: dict[str, Any]) -> None:
        self.batch = batch
        alone: dict[str, Any] = {"preference": "token_reward", "lm_on_chosen": False}
        self.options = LossOptions(pref_gate=1, **alone | terms)
        made = correction(kind, batch.case.d, batch.case.V, torch.float32)
        self.leaves: dict[str, Tensor] = {
            name: x.requires_grad_() for name, x in made.items() if isinstance(x, Tensor)
        } | {"gate_logit": batch.gate_logit}
        absent = dict.fromkeys(("lm_bias", "reward_weight", "objective_weights"))
        self.heads = Heads(lm_weight=batch.lm_weight, **absent | made)

    def value(self, function: Callable[..., Any]) -> Tensor:
        """The loss computed by ``function``, a ``dual_head_loss`` of one of the modules."""
        batch = self.batch
        pairs = [(p, batch.case.pairs + p) for p in range(batch.case.pairs)]
        pairing = Pairing(len(batch.mask), pairs, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=batch.autocast):
            return function(
                batch.hidden, batch.labels, batch.mask, batch.gate_logit, self.heads, self.options,
                pairing,
            ).loss  # fmt: skip

    def forget(self, copy: int = 0) -> None:
        """Delete the gradients, so that the next call allocates them anew."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self, function: Callable[..., Any]) -> dict[str, Tensor]:
        """The loss and the gradients, by name."""
        self.forget()
        loss = self.value(function)
        loss.backward()
        found = {"loss": loss.detach()} | {n: x.grad for n, x in self.leaves.items()}
        self.forget()
        return found

    def check(self, name: str) -> None:
        """Raise RuntimeError unless the fused loss agrees with the reference."""
        expected = self.gradients(reference_loss.dual_head_loss)
        for what, got in self.gradients(chunked.dual_head_loss).items():
            error = ((got - expected[what]).norm() / expected[what].norm()).item()
            if not error <= _TOLERANCE[self.batch.autocast]:
                raise RuntimeError(
                    f"benchmark: {name} and the reference's loss differ by {error:.2g} in {what}"
                )


def run_case(case: LossCase, *, seconds: float, min_rounds: int = 5) -> Contest:
    """Time all contenders of one case and measure their memory.

    Raises:
        RuntimeError: a contender disagrees with the reference.
    """
    batch = Batch(case)
    contenders = {
        "full": (lambda: batch.objective_value(chunked.dual_head_loss), batch.forget, batch.leaves)
    }
    for kind in RANKS:
        for ending, terms in TERMS.items():
            made = CorrectionLoss(batch, kind, terms)
            made.check(f"{kind}{ending}")
            call = partial(made.value, chunked.dual_head_loss)
            contenders[f"{kind}{ending}"] = call, made.forget, made.leaves

    def passes(call: Callable[[], Tensor]) -> Callable[[int], None]:
        return lambda copy: call().backward()

    timed = [Contender(n, passes(call), forget) for n, (call, forget, _) in contenders.items()]
    extra = {
        c.name: peak_bytes(c) - sum(x.nbytes for x in contenders[c.name][2].values()) for c in timed
    }
    timings = alternate(timed, seconds=seconds, min_rounds=min_rounds, warmup=1)
    comparisons = {}
    for name in [name for name in timings if name != "full"]:
        has_goals = (case.d, case.V) == LARGEST and name in RANKS
        goals = (TIME, MEMORY) if has_goals else (None, None)
        comparisons[name] = [
            Comparison.of_times(timings[name], timings["full"], goals[0]),
            Comparison.exact("memory", "full", extra[name] / extra["full"], goals[1]),
        ]
    setting = {"d": case.d, "V": case.V, "format": case.format, "tokens": case.tokens}
    figures = {name: row | {"extra_bytes": extra[name]} for name, row in times(timings).items()}
    for name, row in figures.items():
        row |= {"rank": RANKS[kind]} if (kind := name.split(",")[0]) in RANKS else {}
    return Contest("loss", setting, figures, comparisons)
