# SPDX-License-Identifier: Apache-2.0
"""One decode step: the fused step against the other :mod:`.contenders`, by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..measurement.machine import ReadBandwidth, best_read, read_loops
from ..measurement.timing import Ratio, Timing, alternate, clock_of, copies_needed, ratio
from ..quantization import FORMATS as QUANTIZED
from .cases import FORMATS, SHARE_AT_THE_LIMIT, Case, Group, required_speedup
from .contenders import Operands, bytes_of, cache_bytes, make_contenders, requests


@dataclass(frozen=True)
class CaseResult:
    """Timings of one case, by contender.

    Attributes:
        copies: number of copies of weights and caches, used in turn.
        num_bytes: contender -> bytes that it must at least read from memory.
        compile_options: options of torch.compile; None if it did not take part.
        read: memory bandwidth of plain loops in the same rounds; None if none took part.
    """

    group: Group
    case: Case
    timings: dict[str, Timing]
    num_bytes: dict[str, int]
    copies: int
    compile_options: str | None
    read: ReadBandwidth | None = None

    def speedup(self, over: str) -> Ratio:
        """How many times as long ``over`` takes as the fused step."""
        return ratio(self.timings[over], self.timings["dualhead"])

    def failure(self, read: ReadBandwidth) -> str | None:
        """A sentence if the fused step is too slow, otherwise None.

        A required speed-up above 1 applies to the ratio of medians; a step limited by memory (at
        least SHARE_AT_THE_LIMIT of the bandwidth ``read``) is exempt. A step is slower than eager
        only if the whole 95 % interval of the ratio lies below 1, so that equal speed does not fail
        by chance.
        """
        required, got = required_speedup(self.group, self.case), self.speedup("eager")
        share = read.share(self.num_bytes["dualhead"], self.timings["dualhead"].us_median)
        if required > 1:
            too_slow = got.value < required and share < SHARE_AT_THE_LIMIT
        else:
            too_slow = max(got.value, got.high) < 1
        if not too_slow:
            return None
        return (
            f"{self.group} B={self.case.B} T={self.case.T} "
            f"{'sampled' if self.case.sampled else 'greedy'}: eager takes {got.value:.2f} times as "
            f"long as the fused step (95 % interval {got.low:.2f} to {got.high:.2f}), "
            f"required: {required:g}"
        )

    def rows(self, read: ReadBandwidth) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files store them. The fused step on quantised
        heads has the contender ``dualhead`` and the quantised format."""
        return [
            {
                "contender": "dualhead" if name in QUANTIZED else name,
                "format": name if name in QUANTIZED else self.group.format,
                "d": self.group.d,
                "V": self.group.V,
                "B": self.case.B,
                "T": self.case.T,
                "sampled": self.case.sampled,
                "us_median": timing.us_median,
                "us_q1": timing.us_q1,
                "us_q3": timing.us_q3,
                "repeats": timing.repeats,
                "calls": timing.calls,
                "copies": self.copies,
                "bytes": self.num_bytes[name],
                "read_gb_per_s": read.gb_per_s,
                "share_of_read_bandwidth": read.share(self.num_bytes[name], timing.us_median),
                "compile_options": self.compile_options if name == "compile" else None,
            }
            for name, timing in self.timings.items()
        ]


@dataclass(frozen=True)
class Effort:
    """How long to measure, and the sizes that count as cold.

    Attributes:
        seconds, min_rounds: per case, as in :func:`~dualhead_ext.measurement.timing.alternate`.
        cold_bytes: bytes that operands used in turn must span (:func:`~.machine.cold_bytes`).
        cache_bytes: size of the last-level cache; torch.compile freezes larger weights.
    """

    seconds: float
    cold_bytes: int
    cache_bytes: int
    min_rounds: int = 15


# Events and a graph launch take a few microseconds: under 1 % of calls that read this many bytes,
# which take about a millisecond on a current GPU.
_BYTES_PER_ROUND = 5 * 10**9


def calls_per_round(num_bytes: int) -> int:
    """Number of steps per round of the timer on a GPU, by the bytes of a step: 1 to 10."""
    return max(1, min(10, round(_BYTES_PER_ROUND / num_bytes)))


def run_case(
    case: Case, operands: Operands, effort: Effort, read: ReadBandwidth | None = None
) -> CaseResult:
    """Time all contenders of one case.

    Args:
        read: asks for the bandwidth in the same rounds, over all of the operands' memory: on a
            shared host it changes from second to second. On the CPU all methods take part, and the
            best one counts; on a GPU the best of ``read``.
    Raises:
        RuntimeError: there is no compiled kernel to time, or contenders disagree.
    """
    group = operands.group
    device = operands.device
    if not ops.kernel_for(device.type, FORMATS[group.format]):
        raise RuntimeError(
            f"benchmark: no compiled {device.type.upper()} kernel for {group.format} to time; "
            "`dualhead info` says what was built"
        )
    whole = operands.num_bytes + cache_bytes(group, case)
    count = min(len(operands.copies), copies_needed(whole, effort.cold_bytes))
    in_graphs = case.graphs and device.type == "cuda"
    calls = calls_per_round(operands.num_bytes) if in_graphs else 1
    mine = requests(group, case, count, device, steps=calls)
    arguments = [weights | own for weights, own in zip(operands.copies, mine, strict=False)]
    # A frozen graph has one copy of its weights, and only the CPU packs them.
    freeze = device.type == "cpu" and operands.num_bytes >= effort.cache_bytes
    formats = QUANTIZED if case.quantized else ()
    quantized = {name: operands.quantized(name, effort.cold_bytes) for name in formats}
    with torch.no_grad(), _no_recompiling():
        contenders = make_contenders(
            case, arguments, operands.copies[0], freeze, operands.memory, quantized
        )
        num_read, loops = read_loops(operands.memory) if read else (0, {})
        if read and device.type == "cuda":
            loops = {read.method: loops[read.method]}
        timings = alternate(
            [*contenders, *loops.values()],
            seconds=effort.seconds,
            min_rounds=effort.min_rounds,
            copies=count,
            calls=calls,
            clock=clock_of(device.type),
        )
    if read:
        read = best_read(num_read, {name: timings.pop(name) for name in loops})
    if case.compile:
        torch.compiler.reset()  # frees a frozen graph's weights
    head_alone = group.V * group.d * FORMATS[group.format].itemsize
    num_bytes = dict.fromkeys(timings, whole) | {"lm_head": head_alone}
    for name, copies_of in quantized.items():
        num_bytes[name] = bytes_of(copies_of[0]) + cache_bytes(group, case)
    options = ("max-autotune, freezing" if freeze else "max-autotune") if case.compile else None
    return CaseResult(group, case, timings, num_bytes, count, options, read)


def _no_recompiling():
    """Context in which a recompilation is an error, because it would be timed."""
    from torch._dynamo import config

    return config.patch(error_on_recompile=True)
