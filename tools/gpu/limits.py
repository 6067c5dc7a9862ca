# SPDX-License-Identifier: Apache-2.0
"""Limits on the figures that :mod:`tools.gpu.machine_code` reports; python_tests/csrc holds the
built library to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What one multiprocessor of an H200 may spend: its share of 4.3 TB/s at 1.98 GHz, the latency of a
# load from memory, the warps that issue in one clock, and its registers.
BYTES_PER_CLOCK, LATENCY, SCHEDULERS, REGISTERS = 16.5, 1_600, 4, 65_536
LOSS_THREADS = 512  # of a block of the loss, at the vocabulary sizes of models

# A box of 64 rows of 128 bytes takes 496 clocks; its copy may take the producer an eighth of them.
MOST_CYCLES_PER_COPY = 62
LEAST_LOADS_IN_FLIGHT = 8  # minimum in the gate's projections
MOST_ISSUE_SHARE = 0.5  # of the clocks that a stage's bytes take
# When a tile ends, of one unit and 32 rows. For 64 requests at d = 4096 a warp does that four
# times: 5 % of the 127,000 clocks that the tile's bytes take in bf16.
MOST_FINISH_CYCLES = 1_590


@dataclass(frozen=True)
class Stages:
    """Stages of the same shape (make_plan in stream_plan.h).

    Attributes:
        count: how many of them a tile has, relative to the others of a step.
        units: of a full tile; `left` of them are there.
        blocks: of 128 bytes of each row.
        hidden: rows of hidden states in a stage; 0 if they are resident.
    """

    units: int
    left: int
    blocks: int
    hidden: int
    count: int = 1

    @property
    def boxes(self) -> int:
        """Of a block of one matrix: the left units in powers of two."""
        return self.left.bit_count()

    def hidden_boxes(self, format: str) -> int:
        """16-bit hidden states are read once per step of a run (steps_of)."""
        steps = {"int8": 2, "fp8": 2, "int4": 4}.get(format, 1)
        return self.blocks * steps if self.hidden else 0

    def bytes(self, format: str) -> int:
        """Of both matrices and of hidden states."""
        weights = 2 * 8 * self.left * self.blocks * 128
        return weights + self.hidden_boxes(format) * self.hidden * 128

    def issue_cycles(self, producer: dict[str, Any], format: str) -> int:
        """Of the producer for one stage, from a report's "producers"."""
        hidden = self.hidden_boxes(format)
        cycles = producer["cycles_with_hidden"] if hidden else producer["cycles"]
        cycles += max(0, hidden - 1) * producer["per_hidden_box"]
        cycles += 2 * (self.blocks - 1) * producer["per_block"]
        return cycles + 2 * self.blocks * (self.boxes - 1) * producer["per_box"]


# d = 4096, V = 32000 on 132 multiprocessors: 31 units of eight entries, for one request and for 64.
STEPS = {
    "one request": (Stages(8, 8, 2, 0, count=3), Stages(8, 7, 2, 0)),
    "64 requests": (Stages(16, 16, 1, 64), Stages(16, 15, 1, 64)),
}
STEPS_INT4 = STEPS | {"64 requests": (Stages(8, 8, 1, 64, count=3), Stages(8, 7, 1, 64))}


def issue_shares(producer: dict[str, Any], format: str) -> dict[str, float]:
    """Issue cycles of the producer over the clocks that the bytes take, by step: of a full stage,
    and the mean of the step."""
    found = {}
    for name, stages in (STEPS_INT4 if format == "int4" else STEPS).items():
        cycles = [one.count * one.issue_cycles(producer, format) for one in stages]
        clocks = [one.count * one.bytes(format) / BYTES_PER_CLOCK for one in stages]
        found[f"{name}, full stage"] = round(cycles[0] / clocks[0], 3)
        found[f"{name}, mean"] = round(sum(cycles) / sum(clocks), 3)
    return found


def violations(one: dict[str, Any], format: str) -> list[str]:
    """A sentence for each limit that the report of a streaming kernel exceeds.

    The limits of registers, and of spills outside these loops, are in
    python_tests/csrc/test_cuda_compile.py.
    """
    found = [*fence_violations(one)]
    for loop in one["copy_loops"]:
        if loop["by_lanes"]:
            found.append(f"{loop['kind']} in a loop over lanes")
        elif loop["stall_cycles_per_copy"] > MOST_CYCLES_PER_COPY:
            found.append(f"{loop['stall_cycles_per_copy']} stall cycles per copy")
    if len(one["producers"]) != 1:
        found.append(f"{len(one['producers'])} loops of a producer, expected 1")
    for producer in one["producers"]:
        if producer["fences"]:
            found.append(f"{producer['fences']} fences in each stage of the producer")
        for name, share in issue_shares(producer, format).items():
            if share > MOST_ISSUE_SHARE:
                found.append(f"{name}: the producer issues for {share:.0%} of the bytes' clocks")
    for loop in one["finish_loops"]:
        if loop["cycles"] > MOST_FINISH_CYCLES:
            found.append(
                f"{loop['cycles']} stall cycles at the end of a unit of {loop['rows']} rows"
            )
    for loop in one["consumer_loops"]:
        if not set(loop["shared_loads"]) <= {"128", "LDSM"}:
            found.append(f"shared loads by width, {loop['shared_loads']}, beside products")
        if loop["local_accesses"]:
            found.append(f"{loop['local_accesses']} spilled registers among products")
    for loop in one["global_loops"]:
        if loop["products"] and loop["before_a_wait"] < LEAST_LOADS_IN_FLIGHT:
            found.append(f"a projection with {loop['before_a_wait']} loads before a wait")
    return sorted(set(found))


def fence_violations(one: dict[str, Any]) -> list[str]:
    """That one lane polls is tested on the host backend; machine code does not show it."""
    found = []
    if one["membar_sc_in_loops"]:
        found.append(f"{one['membar_sc_in_loops']} MEMBAR.SC in loops")
    for poll in one["polls"]:
        if poll["of"] == "grid barrier":
            continue  # the toolkit's; nothing else runs in the block meanwhile
        if poll["fences"]:
            found.append(f"{poll['fences']} fences in a loop that polls")
        if poll["fences_after"] != 1:
            found.append(f"{poll['fences_after']} fences after a loop that polls, expected 1")
    return found


def bytes_per_clock(loop: dict[str, Any], registers: int) -> float:
    """How fast a multiprocessor can go through a loop of the loss, by its stall cycles and the
    latency that they do not hide."""
    blocks = REGISTERS // (LOSS_THREADS * -(-registers // 8) * 8)
    threads = min(2048, blocks * LOSS_THREADS)
    clocks = loop["stall_cycles"] + max(0, LATENCY - loop["cycles_before_wait"])
    return threads * 16 * (loop["wide_loads"] + loop["wide_stores"]) / clocks


def loss_violations(one: dict[str, Any], stores: bool) -> list[str]:
    """A sentence for each limit that the report of a kernel of the loss exceeds.

    stores: whether it writes gradients.
    """
    found = [*fence_violations(one)]
    if one["local_bytes"] + one["stack_bytes"]:
        found.append(f"{one['local_bytes'] + one['stack_bytes']} bytes of stack and local memory")
    if len(one["element_loops"]) != 1:
        found.append(f"{len(one['element_loops'])} loops over logits by four, expected 1")
    for loop in one["element_loops"]:
        if loop["wide_loads"] % 2 or (loop["wide_stores"] > 0) != stores:
            found.append(f"{loop['wide_loads']} wide loads, {loop['wide_stores']} wide stores")
        num_bytes = 32 * 16 * (loop["wide_loads"] + loop["wide_stores"])  # of a warp
        slots = SCHEDULERS * num_bytes / BYTES_PER_CLOCK
        if loop["instructions"] > slots:
            found.append(f"{loop['instructions']} instructions in the time of {slots:.0f}")
        rate = bytes_per_clock(loop, one["registers"])
        if rate < BYTES_PER_CLOCK:
            found.append(f"{rate:.1f} bytes per clock, of {BYTES_PER_CLOCK}")
        if loop["local_accesses"]:
            found.append(f"{loop['local_accesses']} spilled registers among logits")
    return sorted(set(found))


def summary(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the limits are about, by kernel: the producers' shares of issue cycles, and the loss's
    bytes per clock of a multiprocessor."""
    shares, rates = {}, {}
    for name, one in reports.items():
        if one["producers"]:
            format = name.partition("<")[2].partition(",")[0]
            shares[name] = issue_shares(one["producers"][0], format)
        elif name.startswith("loss_rows"):
            rates[name] = round(bytes_per_clock(one["element_loops"][0], one["registers"]), 1)
    return {"issue_shares": shares, "loss_bytes_per_clock": rates}
