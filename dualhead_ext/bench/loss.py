# SPDX-License-Identifier: Apache-2.0
"""The training loss, forward and backward, against the other :mod:`.loss_contenders`: time, and
memory beyond the gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from ..measurement.timing import Contender, Timing, alternate, clock_of, ratio
from .loss_cases import LARGEST, LossCase
from .loss_contenders import (
    Batch,
    Call,
    eager_language_model_term,
    language_model_calls,
    whole_calls,
)
from .memory import peak_of
from .tables import loss_setting

# Upper limits for the fused loss at the largest size: its share of eager's time and of eager's
# memory beyond the gradients. At other sizes it must not be slower than eager.
REQUIRED_TIME, REQUIRED_MEMORY = 0.8, 0.15

# Allowed relative difference of losses and gradients from eager's, by autocast. In bf16, logits of
# order 1 round to 3 digits, and the gate's gradient is a difference of them. The contenders of the
# language model term round more (a h, and some of them their sums): only gross errors show.
_TOLERANCE = {True: 5e-2, False: 1e-3}
_LANGUAGE_MODEL_TOLERANCE = {True: 0.3, False: 1e-3}


def _is_largest(case: LossCase) -> bool:
    return (case.d, case.V) == LARGEST


def _required_ratio(case: LossCase) -> float:
    """Required ratio of eager's time to the fused loss's."""
    return 1 / REQUIRED_TIME if _is_largest(case) else 1.0


@dataclass(frozen=True)
class LossResult:
    """Timings of forward and backward together, and peak bytes beyond the gradients."""

    case: LossCase
    timings: dict[str, Timing]
    extra_bytes: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files have them."""
        return [
            {
                "contender": name,
                **self.case.settings(),
                "us_median": timing.us_median,
                "us_q1": timing.us_q1,
                "us_q3": timing.us_q3,
                "repeats": timing.repeats,
                "extra_bytes": self.extra_bytes[name],
            }
            for name, timing in self.timings.items()
        ]

    def failures(self) -> list[str]:
        """A sentence for each requirement that was missed."""
        against = ratio(self.timings["eager"], self.timings["dualhead"])
        memory = self.extra_bytes["dualhead"] / self.extra_bytes["eager"]
        found, name = [], f"loss {self.case}, {loss_setting(self.case.settings())}"
        if max(against.value, against.high) < _required_ratio(self.case):
            found.append(
                f"{name}: eager takes {against.value:.2f} times as long (95 % interval "
                f"{against.low:.2f} to {against.high:.2f})"
            )
        if _is_largest(self.case) and memory > REQUIRED_MEMORY:
            found.append(f"{name}: {memory:.0%} of the memory that eager takes")
        return found

    def text(self) -> str:
        """The rows for a terminal."""
        setting = loss_setting(self.case.settings())
        lines = [f"\nloss, {self.case}, {setting}, forward and backward"]
        for row, timing in zip(self.rows(), self.timings.values(), strict=True):
            against = ratio(timing, self.timings["dualhead"])
            lines.append(
                f"    {row['contender']:<13} {row['us_median'] / 1e3:>9.1f} ms "
                f"({row['us_q1'] / 1e3:.1f}..{row['us_q3'] / 1e3:.1f}), {against.value:.2f} times "
                f"dualhead's time ({against.low:.2f}..{against.high:.2f}), "
                f"{row['extra_bytes'] / 1e6:.0f} MB beyond the gradients, n = {row['repeats']}"
            )
        return "\n".join(lines + [f"    MISSED: {failure}" for failure in self.failures()])


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # else eager is silently timed
def run_case(
    case: LossCase, *, seconds: float, min_rounds: int = 5, device_type: str = "cpu"
) -> LossResult:
    """Time all contenders of one case and measure their memory.

    Args:
        seconds, min_rounds: as in :func:`~dualhead_ext.measurement.timing.alternate`.
    Raises:
        RuntimeError: contenders disagree.
    """
    if case.compile:
        torch.compiler.reset()  # graphs of other cases would count towards the limit
    batch = Batch(case, device_type)
    whole, parts = whole_calls(batch, case.compile), language_model_calls(batch)
    _check_agreement(batch, whole, _TOLERANCE)
    if parts:
        eager = {"eager": lambda: eager_language_model_term(batch)}
        _check_agreement(batch, eager | parts, _LANGUAGE_MODEL_TOLERANCE)

    def passes(call: Call) -> Callable[[int], None]:
        return lambda copy: call().backward()

    contenders = [Contender(n, passes(call), batch.forget) for n, call in (whole | parts).items()]
    gradients = sum(leaf.nbytes for leaf in batch.leaves.values())
    peak = peak_of(device_type)
    extra = {c.name: peak(c) - gradients for c in contenders}
    timings = alternate(
        contenders,
        seconds=seconds,
        min_rounds=min_rounds,
        warmup=1,
        clock=clock_of(device_type),
    )
    batch.forget()
    return LossResult(case, timings, extra)


def _check_agreement(batch: Batch, calls: dict[str, Call], tolerance: dict[bool, float]) -> None:
    """Raise RuntimeError unless all losses and gradients agree with those of ``eager``."""
    expected = batch.gradients(calls["eager"])
    for name in [name for name in calls if name != "eager"]:
        for what, got in batch.gradients(calls[name]).items():
            error = _difference(got, expected[what])
            if not error <= tolerance[batch.autocast]:
                raise RuntimeError(
                    f"benchmark: {name} and eager's loss differ by {error:.2g} in {what}"
                )


def _difference(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()
