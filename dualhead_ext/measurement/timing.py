# SPDX-License-Identifier: Apache-2.0
"""The project's only timer: every speed figure was measured by :func:`alternate`.

Contenders take turns, one call (on a GPU a few) each per round, in an order that shifts from round
to round: other load on the machine, or a drop of its clock rate, affects all of them alike. Every
call uses the next copy of its operands, so that even operands that would fit into the cache are
read from memory; see :func:`copies_needed`.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Long enough for the host to queue one launch meanwhile: about 0.1 ms.
_BUSY_CYCLES = 200_000


def _nothing(copy: int) -> None:
    """The default of :attr:`Contender.prepare`."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: its name in tables and results files.
        call: the timed function; its argument is the number of the copy of the operands to use.
        prepare: called with the same number before each call, untimed; resets a cache's length,
            for example.
    """

    name: str
    call: Callable[[int], object]
    prepare: Callable[[int], object] = _nothing


class Clock(Protocol):
    """Times consecutive calls."""

    def us(self, call: Callable[[int], object], copies: Sequence[int]) -> float:
        """Microseconds of one ``call(copy)``, the mean over ``copies``."""


class HostClock:
    """Host time, for work that is complete when the call returns."""

    def us(self, call: Callable[[int], object], copies: Sequence[int]) -> float:
        """Microseconds of one ``call(copy)``, the mean over ``copies``."""
        before = time.perf_counter_ns()
        for copy in copies:
            call(copy)
        return (time.perf_counter_ns() - before) / 1000 / len(copies)


class CudaClock:
    """Device time between two CUDA events.

    The device is kept busy for about 0.1 ms while the host queues the first call, so launch
    overhead is timed only if it exceeds that: one launch (a kernel, a graph) does not, the thirty
    launches of an eager step do. The events themselves take a few microseconds, which several
    calls share.
    """

    def __init__(self) -> None:
        import torch

        self._sleep, self._events = (
            torch.cuda._sleep,
            [torch.cuda.Event(enable_timing=True) for _ in range(2)],
        )

    def us(self, call: Callable[[int], object], copies: Sequence[int]) -> float:
        """Microseconds of one ``call(copy)``, the mean over ``copies``."""
        start, end = self._events
        self._sleep(_BUSY_CYCLES)
        start.record()
        for copy in copies:
            call(copy)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / len(copies)


def clock_of(device_type: str) -> Clock:
    """The clock for work on a device of this type."""
    return CudaClock() if device_type == "cuda" else HostClock()


@dataclass(frozen=True)
class Timing:
    """How long one contender took, round by round.

    Attributes:
        name: the contender's name.
        us: microseconds of a call in each round.
        calls: calls per round; ``us`` is their mean.
    """

    name: str
    us: tuple[float, ...] = field(repr=False)
    calls: int = 1

    @property
    def us_median(self) -> float:
        """Median, microseconds."""
        return statistics.median(self.us)

    @property
    def us_q1(self) -> float:
        """Lower quartile, microseconds."""
        return statistics.quantiles(self.us, n=4, method="inclusive")[0]

    @property
    def us_q3(self) -> float:
        """Upper quartile, microseconds."""
        return statistics.quantiles(self.us, n=4, method="inclusive")[2]

    @property
    def repeats(self) -> int:
        """Rounds timed."""
        return len(self.us)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one contender takes as another.

    Attributes:
        value: ratio of the medians, so that the numbers in a table agree with each other.
        low, high: 95 % interval of the median ratio over rounds; both times of a ratio are from the
            same round, so that drift of the machine cancels. ``value`` need not be the midpoint.
    """

    value: float
    low: float
    high: float


def alternate(
    contenders: Sequence[Contender],
    *,
    seconds: float,
    copies: int = 1,
    min_rounds: int = 15,
    max_rounds: int = 1000,
    warmup: int = 2,
    calls: int = 1,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time contenders against each other, in turns.

    Args:
        contenders: at least one, with different names.
        seconds: how long to measure, without the warm-up; at least ``min_rounds`` and at most
            ``max_rounds`` rounds are measured in any case.
        copies: number of copies of the operands; call n of the run uses copy n mod ``copies``.
        warmup: number of untimed rounds.
        calls: consecutive calls of a contender in a round; their mean is the round's time.
        clock: clock for the device that the contenders run on; default :class:`HostClock`.
    Returns: a timing per name, all of the same number of rounds.
    Raises:
        ValueError: no contenders, two of one name, or fewer than 2 rounds (no quartiles).
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"alternate: contenders must be at least one and differ, got {names}")
    if not 2 <= min_rounds <= max_rounds:
        raise ValueError(
            "alternate: rounds must satisfy 2 <= min_rounds <= max_rounds, "
            f"got {min_rounds} and {max_rounds}"
        )
    clock = clock or HostClock()
    taken: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever triggers it
    try:
        start = time.perf_counter()
        for number in range(-warmup, max_rounds):
            if number == 0:
                start = time.perf_counter()
            if number >= min_rounds and time.perf_counter() - start >= seconds:
                break
            for place in range(len(contenders)):
                contender = contenders[(place + number) % len(contenders)]
                turns = [number_of_call % copies for number_of_call in range(turn, turn + calls)]
                for copy in sorted(set(turns)):
                    contender.prepare(copy)
                us = clock.us(contender.call, turns)
                turn += calls
                if number >= 0:
                    taken[contender.name].append(us)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(name, tuple(us), calls) for name, us in taken.items()}


def ratio(slower: Timing, faster: Timing) -> Ratio:
    """Time of ``slower`` over time of ``faster``, both from one call of :func:`alternate`; above 1
    if ``slower`` really is slower.

    The interval is that of the sign test: the order statistics of the n paired ratios at
    ``n/2 -+ 0.98 sqrt(n)``. It assumes nothing about the distribution of the times.
    """
    paired = sorted(a / b for a, b in zip(slower.us, faster.us, strict=True))
    reach = 0.98 * math.sqrt(len(paired))
    low = max(0, math.floor(len(paired) / 2 - reach))
    high = min(len(paired) - 1, math.ceil(len(paired) / 2 + reach) - 1)
    return Ratio(slower.us_median / faster.us_median, paired[low], paired[high])


def copies_needed(bytes_each: int, cold_bytes: int) -> int:
    """How many copies of operands of ``bytes_each`` bytes must be used in turn to keep each cold.

    Together they span at least ``cold_bytes``
    (:func:`dualhead_ext.measurement.machine.cold_bytes`, a few last-level caches). Real decoding
    reads the whole backbone between two steps of the head.
    """
    return max(1, math.ceil(cold_bytes / bytes_each))
