# SPDX-License-Identifier: Apache-2.0
"""Training steps with a frozen backbone: the cost of the heads beyond the backbone's forward pass.

Contenders, over one batch of pairs that is on the host at the start of each step, as a data loader
delivers it:

- ``forward``: the backbone's forward pass alone, without gradients.
- ``dualhead``: a training step: forward pass, gate, fused loss, backward, clipping, AdamW.
- ``eager``: the same with the loss in plain PyTorch (:mod:`dualhead_ext.loss.reference`).
- ``cached``: ``dualhead`` with the batch's hidden states given, so that no backbone runs.

A step makes the same calls as :class:`dualhead_ext.DualHeadTrainer` with its defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..loss import chunked
from ..measurement.timing import Contender, Ratio, Timing, alternate, clock_of, ratio
from . import eager_loss
from .memory import peak_of
from .training_cases import TrainingCase

if TYPE_CHECKING:
    from .training_steps import Way


@dataclass(frozen=True)
class TrainingResult:
    """Timings and memory of whole steps, by contender.

    Attributes:
        held_bytes: bytes of backbone, heads and optimizer, which stay from step to step.
        extra_bytes: contender -> peak bytes of a step beyond those in use before it.
    """

    case: TrainingCase
    timings: dict[str, Timing]
    held_bytes: int
    extra_bytes: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files have them."""
        case = self.case

        def rate(us: float) -> float:
            return case.tokens / us * 1e6

        return [
            {
                "contender": name,
                "model": case.name,
                "format": "bf16",
                "pairs": case.pairs,
                "tokens": case.tokens,
                "response_tokens": 2 * case.pairs * case.response_tokens,
                "tokens_per_s_median": rate(timing.us_median),
                "tokens_per_s_q1": rate(timing.us_q3),
                "tokens_per_s_q3": rate(timing.us_q1),
                "repeats": timing.repeats,
                "held_bytes": self.held_bytes,
                "extra_bytes": self.extra_bytes[name],
            }
            for name, timing in self.timings.items()
        ]

    def against_forward(self, contender: str) -> Ratio:
        """How many times as long a contender takes as the backbone's forward pass."""
        return ratio(self.timings[contender], self.timings["forward"])

    def failures(self) -> list[str]:
        """A sentence if a step exceeds its limit by more than the spread."""
        against = self.against_forward("dualhead")
        if self.case.allowed is None or min(against.value, against.low) <= self.case.allowed:
            return []
        return [
            f"training {self.case.name}: a step takes {against.value:.3f} times as long as the "
            f"backbone's forward pass (95 % interval {against.low:.3f} to {against.high:.3f}), "
            f"allowed: {self.case.allowed:g}"
        ]

    def text(self) -> str:
        """The rows for a terminal."""
        case = self.case
        lines = [
            f"\ntraining, {case.name}, bf16, {case.pairs} pairs, {case.tokens} tokens, "
            f"{self.held_bytes / 1e6:.0f} MB of weights and optimizer"
        ]
        for row in self.rows():
            against = self.against_forward(row["contender"])
            lines.append(
                f"    {row['contender']:<9} {row['tokens_per_s_median']:>9.0f} tokens/s "
                f"({row['tokens_per_s_q1']:.0f}..{row['tokens_per_s_q3']:.0f}), "
                f"{against.value:.3f} times forward's time "
                f"({against.low:.3f}..{against.high:.3f}), "
                f"{row['extra_bytes'] / 1e6:.0f} MB more in a step, n = {row['repeats']}"
            )
        return "\n".join(lines + [f"    TOO SLOW: {failure}" for failure in self.failures()])


def run_case(
    case: TrainingCase, *, seconds: float, min_rounds: int = 5, device_type: str = "cpu"
) -> TrainingResult:
    """Time all contenders of one case and measure their memory.

    Args:
        seconds, min_rounds: as in :func:`~dualhead_ext.measurement.timing.alternate`.
    Raises:
        RuntimeError: contenders disagree.
    """
    from .training_steps import Training, check_agreement

    training = Training(case, device_type)
    fused, eager = chunked.dual_head_loss, eager_loss.dual_head_loss
    ways = {
        "dualhead": (training.batch, fused),
        "eager": (training.batch, eager),
        "cached": (training.cached, fused),
    }
    check_agreement(training, ways)
    contenders = [Contender("forward", lambda copy: training.forward())]

    def step(way: Way) -> Callable[[int], None]:
        return lambda copy: training.step(*way)

    contenders += [Contender(name, step(way)) for name, way in ways.items()]
    training.step(*ways["dualhead"])  # allocates the optimizer's state
    peak = peak_of(device_type)
    extra = {contender.name: peak(contender) for contender in contenders}
    timings = alternate(
        contenders,
        seconds=seconds,
        min_rounds=min_rounds,
        warmup=1,
        clock=clock_of(device_type),
    )
    return TrainingResult(case, timings, training.held_bytes(), extra)
