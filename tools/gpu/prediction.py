# SPDX-License-Identifier: Apache-2.0
"""Predicted time of the decode step on an H200, from its machine code and what an H200 has shown.
The prediction is to be confirmed or corrected by measurement, row by row.

``python -m tools.gpu.prediction`` writes ``benchmarks/results/predicted-h200.json``;
``python -m tools.gpu.prediction --against FOLDER`` compares it with a check's ``timings.jsonl``.

The constants come from ``benchmarks/results/h200-timeline.json``, measured with the kernels of
commit a7c479c. Given the properties of that version (``MEASURED_VERSION``), the model returns the
measured times of its twelve cases to 15 %, ten of them to 5 % (test_prediction.py). The present
kernels have not run. In clocks of the busiest block::

    start   until the first grid barrier ends. Before it the projections, or the hidden states of
            quantised weights, are computed; a correction has a second barrier
    stream  the stages of all tiles. A stage takes the longest of: its bytes at the bandwidth, the
            time that a stage is under way divided by the stages under way, its boxes, the
            producer's instructions, and a consumer warp's dependent products
    waves   the slowest multiprocessor's share, where memory is what a stage waits for
    gate    how long tiles that cannot wait any longer wait for alpha: a chain of loads, each behind
            the bytes that are under way
    finish  ends of tiles, as far as the ring does not hide them, and that of the last tile: what
            a7c479c took, in proportion to the stall cycles
    end     the last grid barrier, and the token
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import limits
from .processes import ROOT
from .records import read_lines

# --- measured on an H200 (h200-timeline.json, nvidia-h200.json) -----------------------------------
CLOCK, LAUNCH_US = 1.82e9, 1.6  # the slope and the intercept of six runs' times over their clocks
BLOCKS = 132
# Boxes of 128 bytes a row, the slope over two sizes: 17.6 bytes per clock and multiprocessor.
BANDWIDTH = 4.23e12
LATENCY = 1_600  # of a load while memory is idle
# From a copy's start to its arrival while the stream runs: with 64 KiB under way a multiprocessor
# read 11.8 bytes per clock.
UNDER_WAY_CLOCKS = 5_560
# A box within a step: the last tile of a7c479c, 28 or 31 boxes a stage, took as long as a whole
# one. (A kernel that does nothing but read boxes of 8 rows took 209 clocks for each.)
BOX_CLOCKS = 60
START_CLOCKS = 14_000  # until the first grid barrier ends, without work before it
PREPARE_CLOCKS = 10_000  # hidden states for quantised weights
RESIDENT_CLOCKS = 2_000  # hidden states that only move to shared memory
BARRIER_CLOCKS, TOKEN_CLOCKS = 2_200, 9_700  # after the slowest block
WAVES = 1.045  # the slowest multiprocessor over the median
GATE_LOADS = 8.3  # attention and alpha, a chain of loads; the same for one request and for 64
# One dependent product of a warp, with its operands; and what each stage costs a warp besides.
PRODUCT_CLOCKS = {"bf16": 84, "fp16": 84, "int8": 65, "fp8": 65, "int4": 61}
STAGE_CLOCKS, SCALES_CLOCKS = 150, 400
LARGE_STAGE_CLOCKS = 1_395  # a warp's products of a stage for 64 requests, bf16
# The end of a tensor core tile of 8 columns: 16 of them, for 64 requests, took 60,000 clocks. The
# shortest way through the loop that did it has FINISH_STALLS stall cycles; the rest was waiting.
FINISH_CLOCKS = 60_000 / 16
FINISH_STALLS = 870

# --- the kernels ----------------------------------------------------------------------------------
GATE_WARPS = 3  # of a block; they project
CONSUMERS, SCHEDULERS = 8, 4
KIB = 1 << 10
SHARED_BYTES, HEAD_BYTES = 227 * KIB, 1 * KIB
PROJECTED_ROWS, FOLDED_ROWS = 2 * 8 * 48, 8  # of the gate's matrices; the folded ones are fp32
GATE_NUMBERS = PROJECTED_ROWS + 2 * FOLDED_ROWS
COLUMN_BYTES = 8 * 48 * 2 + 8 * 4 + 1  # of the gate's cache, for each column
UNIT = 8  # vocabulary entries of a tile of the tensor cores
ROW_BLOCK = 128  # bytes of a row in a box
CORRECTION_LOADS = 4  # from D h to the corrected input of the LM head, behind its own barrier
# stream_plan.h: bytes of a row's sums of a warp; what is under way if alpha would be late, and what
# decides it.
SUMS_BYTES = 2 * 12 * 4
UNDER_WAY, MOST_AHEAD, IDLE_LOAD_BYTES = 64 * KIB, 128 * KIB, 28 * KIB
BITS = {"bf16": 16, "fp16": 16, "int8": 8, "fp8": 8, "int4": 4}
GROUP = 128  # int4 weights that share an fp32 scale
RESULT = ROOT / "benchmarks" / "results" / "predicted-h200.json"
NOTE = (
    "A PREDICTION for an H200 from machine code and from what an older version of the kernels "
    "measured there (tools/gpu/prediction.py). Nothing here was measured."
)
# Goals in microseconds, by case of tools.gpu.timings.
GOALS = {
    "bf16-4096x32000-1": 130,
    "bf16-4096x128256-1": 505,
    "bf16-8192x128256-1": 1005,
    "int8-4096x32000-1": 69,
    "int8-4096x128256-1": 258,
    "int4-4096x32000-1": 42,
    "int4-4096x128256-1": 140,
    "bf16-4096x32000-4": 130 * 1.02,
    "bf16-4096x32000-16": 130 * 1.04,
    "bf16-4096x32000-64": 130 * 1.10,
    "embedding-4096x32000-1": 70,
}


@dataclass(frozen=True)
class Kernel:
    """The properties of a kernel's machine code that the model needs.

    Attributes:
        cycles_per_copy: the producer's stall cycles per box.
        cycles_per_stage: those of a stage besides.
        finish_cycles: the consumers' stall cycles at the end of a tensor core tile of 8 columns, by
            the columns that a warp finishes at once. Corrections have none: they end as in a7c479c.
        consumer_bytes_per_clock: bytes per clock that all consumers of a multiprocessor process,
            for one request.
    """

    cycles_per_copy: float
    consumer_bytes_per_clock: float
    cycles_per_stage: float = 0.0
    finish_cycles: dict[int, float] = field(default_factory=dict)


def kernel_of(report: dict[str, Any], format: str) -> Kernel:
    """A :class:`Kernel` from a report of :mod:`tools.gpu.machine_code`.

    A tensor core product takes 16 x 16 weights (rows x inputs). The machine code does not show
    which loop serves one request; the slowest one is used.
    """
    [producer] = report["producers"]
    # As if each box were in a block of its own, as it is in a full tile.
    per_copy = producer["per_block"]
    per_stage = producer["cycles_with_hidden"] - 2 * per_copy
    rates = []
    for loop in report["consumer_loops"]:
        num_bytes = loop["products"] * 16 * 16 * BITS[format] / 8
        by_stalls = CONSUMERS * num_bytes / loop["stall_cycles"]
        rates.append(min(by_stalls, SCHEDULERS * num_bytes / loop["instructions"]))
    finish: dict[int, float] = {}
    for loop in report["finish_loops"]:
        cycles = loop["cycles"] / (loop["rows"] / 8)
        finish[loop["rows"]] = max(cycles, finish.get(loop["rows"], 0.0))
    return Kernel(per_copy, min(rates), per_stage, finish)


@dataclass(frozen=True)
class Version:
    """What the model must know of a version of the kernels besides its machine code.

    Attributes:
        plans_gate: whether `plan_gate` decides if the gate projects before the grid barrier, and
            how much is under way until alpha is known. If not: behind it, and the whole ring.
        boxes_per_unit: whether a tile that is not full has a box for each unit, instead of one for
            each binary digit of their number.
        moves_sums: whether the sums of a full head move through shared memory when a tile ends.
        kept_tiles: tiles that can wait for alpha, by whether the batch has more than 8 rows.
        products: dependent products of a consumer warp per stage.
    """

    plans_gate: bool = True
    boxes_per_unit: bool = False
    moves_sums: bool = True
    kept_tiles: tuple[int, int] = (4, 0)
    products: dict[str, int] = field(
        default_factory=lambda: {"bf16": 8, "fp16": 8, "int8": 16, "fp8": 16, "int4": 16}
    )


PRESENT = Version()
MEASURED_VERSION = Version(  # a7c479c, which ran
    plans_gate=False,
    boxes_per_unit=True,
    moves_sums=False,
    kept_tiles=(4, 0),
    products={"bf16": 8, "fp16": 8, "int8": 16, "fp8": 16, "int4": 32},
)


def bytes_read(
    d: int, V: int, B: int, T: int, format: str, reward_head: str = "full", r: int = 0
) -> tuple[float, float]:
    """(of the (V, d) heads, of all) that a step must read. r: rank of a correction."""
    scales = V * 4 * (d / GROUP if format == "int4" else 1 if BITS[format] == 8 else 0)
    heads = (V * d * BITS[format] / 8 + scales) * (2 if reward_head == "full" else 1)
    changed = {"full": 0, "embedding": d, "lowrank": V}[reward_head]
    maps = 2 * (r * d + changed * (r + 1)) if changed else 0
    gate = GATE_NUMBERS * d * 2 + B * T * COLUMN_BYTES
    return heads, heads + maps + gate


def bytes_per_clock() -> float:
    """Of a multiprocessor."""
    return BANDWIDTH / CLOCK / BLOCKS


def least_consumer_rate() -> float:
    """Required bytes per clock of the consumers: 1.3 times what 4.3 TB/s ask for at the highest
    clock, 1.98 GHz."""
    return 1.3 * 4.3e12 / 1.98e9 / BLOCKS


def load_clocks(under_way: float) -> float:
    """A load's latency behind so many bytes. With 128 KiB the slowest took 9,000 clocks."""
    return LATENCY + min(under_way, 128 * KIB) / bytes_per_clock()


@dataclass(frozen=True)
class _Plan:
    """The plan of ``make_plan`` (stream_plan.h) for 227 KiB, as far as the model needs it."""

    batch: int  # rows of hidden states of a tile
    units: int  # of a full tile
    blocks: int  # of 128 bytes of a row, per stage
    weights: int  # bytes of a stage
    hidden: int  # bytes of a stage; 0 if hidden states are resident
    stages: int
    under_way: int  # stages until alpha is known
    early: bool  # the gate projects before the grid barrier

    @property
    def tensor_tiles(self) -> int:
        """Tiles of 8 columns of a warp."""
        return self.units // CONSUMERS * (self.batch // 8)


def _plan(version: Version, d: int, V: int, B: int, format: str, reward_head: str) -> _Plan:
    rows = 8 * math.ceil(B / 4) if reward_head == "embedding" else B
    batch = 8
    while batch < rows:
        batch *= 2
    large = batch > 8
    units = 8 if not large or (format == "int4" and batch == 64) else 16
    blocks = 1 if large else 2
    steps = 16 // BITS[format]
    weights = 2 * units * UNIT * ROW_BLOCK * blocks
    whole = batch * 2 * d
    resident = not large and whole <= SHARED_BYTES // 2 - 10 * KIB
    hidden = 0 if resident else batch * ROW_BLOCK * blocks * steps
    tiles = units // CONSUMERS * (batch // 8)
    kept = version.kept_tiles[large] * tiles * 2 * UNIT * 8 * 4 * CONSUMERS
    moves = version.moves_sums and reward_head == "full"
    sums = SUMS_BYTES * min(batch, 32) * CONSUMERS if moves else 0
    space = SHARED_BYTES - HEAD_BYTES - kept - sums - (whole if resident else 0)
    stages = min(8, space // (weights + hidden))
    early, under_way = reward_head != "full", stages
    if version.plans_gate:
        ahead = min(stages * (weights + hidden), MOST_AHEAD) + IDLE_LOAD_BYTES
        waiting = min(
            max(1, version.kept_tiles[large]) * units, math.ceil(_units(V, reward_head) / BLOCKS)
        )
        until_needed = waiting * 2 * UNIT * d * BITS[format] / 8
        early = early or until_needed < (15 if B <= 16 else 20) * ahead
        if until_needed < (9 if early else 15 if B <= 16 else 20) * ahead:
            under_way = min(stages, max(2, math.ceil(UNDER_WAY / (weights + hidden))))
    return _Plan(batch, units, blocks, weights, hidden, stages, under_way, early)


def _units(V: int, reward_head: str) -> int:
    """Of all blocks; a correction's have entries of both halves of the vocabulary."""
    units = math.ceil(V / UNIT)
    return units if reward_head == "full" else math.ceil(units / 2)


def _start(plan: _Plan, d: int, B: int, format: str) -> float:
    """Clocks until the first grid barrier ends."""
    own = RESIDENT_CLOCKS if BITS[format] == 16 else PREPARE_CLOCKS
    if not plan.early:
        return START_CLOCKS + own
    slices, warps = math.ceil(d / 512), BLOCKS * GATE_WARPS
    tiles = PROJECTED_ROWS // 16 * slices * math.ceil(B / 32)
    folded = FOLDED_ROWS // 2 * slices * math.ceil(B / 2)
    of_tiles = math.ceil(tiles / warps)
    loads = 4 * of_tiles + math.ceil((tiles + folded) / warps) - of_tiles
    return START_CLOCKS + max(own, loads * LATENCY)


def _late_projection_loads(B: int) -> float:
    """Projections behind the first barrier, and their own barrier."""
    return 6.0 if B <= 16 else 10.3


def predict(
    kernel: Kernel,
    d: int,
    V: int,
    B: int,
    format: str,
    T: int = 256,
    reward_head: str = "full",
    r: int = 0,
    version: Version = PRESENT,
) -> dict[str, float]:
    """Microseconds of a step and of each term."""
    plan = _plan(version, d, V, B, format, reward_head)
    rate = bytes_per_clock()
    busiest = math.ceil(_units(V, reward_head) / BLOCKS)
    chunks = math.ceil(d * BITS[format] / 8 / ROW_BLOCK / plan.blocks)
    consumers = STAGE_CLOCKS + version.products[format] * PRODUCT_CLOCKS[format]
    consumers += SCALES_CLOCKS if format == "int4" else 0
    if plan.batch == 64 and BITS[format] == 16:
        consumers = STAGE_CLOCKS + LARGE_STAGE_CLOCKS
    by_instructions = plan.weights / kernel.consumer_bytes_per_clock
    consumers = max(consumers, by_instructions if plan.batch == 8 else 0.0)

    start = _start(plan, d, B, format)
    under_way = plan.under_way * (plan.weights + plan.hidden)
    # If the consumers are slower than memory, the ring is full and a load waits for nothing.
    slow = consumers > plan.weights / rate
    load = UNDER_WAY_CLOCKS if slow else load_clocks(under_way)
    alpha = start + GATE_LOADS * load
    if not plan.early:
        alpha = START_CLOCKS + (_late_projection_loads(B) + GATE_LOADS) * load
    if reward_head != "full":
        start += BARRIER_CLOCKS + CORRECTION_LOADS * LATENCY
    finish = FINISH_CLOCKS * plan.tensor_tiles
    if version.moves_sums and reward_head == "full":
        finish *= kernel.finish_cycles[min(plan.batch, 32)] / FINISH_STALLS
    now, stream, from_memory, gate, ends = start, 0.0, 0.0, 0.0, 0.0
    early, waiting, known = plan.under_way, 0, False
    for first in range(0, busiest, plan.units):
        tile = min(plan.units, busiest - first)
        digits = tile if version.boxes_per_unit else tile.bit_count()
        boxes = (2 * (1 if tile == plan.units else digits)) * plan.blocks
        boxes += plan.blocks * 16 // BITS[format] if plan.hidden else 0
        memory = plan.weights * tile / plan.units / rate
        for _ in range(chunks):
            others = max(
                boxes * BOX_CLOCKS,
                kernel.cycles_per_stage + boxes * kernel.cycles_per_copy,
                consumers,
                UNDER_WAY_CLOCKS / (plan.stages if now > alpha else plan.under_way),
            )
            if early > 0:  # arrived before the start ended
                early, stage = early - 1, consumers
            else:
                stage = max(memory, others)
                from_memory += stage if memory >= others else 0.0
            now, stream = now + stage, stream + stage
        last = first + plan.units >= busiest
        if not known and now < alpha:
            if not last and waiting < version.kept_tiles[plan.batch > 8]:
                waiting += 1
                continue
            gate, now = gate + alpha - now, alpha
        # alpha itself is loaded once.
        took = (1 + waiting) * finish + (0.0 if known else load)
        hidden = 0.0 if last else (plan.stages - 1) * plan.weights / rate
        known, waiting = True, 0
        ends, now = ends + max(0.0, took - hidden), now + max(0.0, took - hidden)
    clocks = {
        "start": start,
        "stream": stream,
        "waves": (WAVES - 1) * from_memory,
        "gate": gate,
        "finish": ends,
        "end": BARRIER_CLOCKS + TOKEN_CLOCKS,
    }
    terms = {f"{name}_us": value / CLOCK * 1e6 for name, value in clocks.items()}
    terms["start_us"] += LAUNCH_US
    return {
        "us": round(sum(terms.values()), 1),
        **{name: round(value, 1) for name, value in terms.items()},
        "memory_us": round(bytes_read(d, V, B, T, format, reward_head, r)[1] / BANDWIDTH * 1e6, 1),
    }


def predictions(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of the file: constants, kernel properties, and a row for each timings case."""
    from .timings import CASES

    kernels = {
        f"{format}, {kind}": kernel_of(reports[f"stream_kernel<{format}, 1, {number}>"], format)
        for format in BITS
        for number, kind in enumerate(("full", "correction"))
    }
    constants = {"bandwidth": BANDWIDTH, "clock": CLOCK, "launch_us": LAUNCH_US}
    rows = []
    for name, case in CASES.items():
        kind = {"reward_head": case.reward_head, "r": case.r}
        kernel = "full" if case.reward_head == "full" else "correction"
        found = predict(
            kernels[f"{case.format}, {kernel}"], case.d, case.V, case.B, case.format, **kind
        )
        goal = {"goal_us": round(GOALS[name], 1)} if name in GOALS else {}
        rows.append({"case": name, "predicted": True, **found, **goal})
    return {
        "note": NOTE,
        "predicted": True,
        "constants": constants,
        "kernels": {name: vars(kernel) for name, kernel in kernels.items()},
        **limits.summary(reports),
        "rows": rows,
    }


def beside(predicted: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    """A line per case: predicted, measured, goal, the largest term, and the bytes at the
    bandwidth."""
    steps = {row["case"]: row for row in measured if row.get("contender") == "step"}
    lines = [
        "| case | predicted us | measured us | measured / predicted | goal us | next to the stream "
        "| bytes alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in predicted["rows"]:
        got = steps.get(row["case"], {}).get("us_median")
        others = ("start_us", "waves_us", "gate_us", "finish_us", "end_us")
        largest = max(others, key=lambda name: row[name])
        cells = [
            row["case"],
            f"{row['us']:.1f}",
            "not measured" if got is None else f"{got:.1f}",
            "" if got is None else f"{got / row['us']:.2f}",
            row.get("goal_us", ""),
            f"{largest.removesuffix('_us')} {row[largest]:.1f}",
            f"{row['memory_us']:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Write the prediction, or compare it with a measurement."""
    from . import machine_code

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    library = ROOT / "dualhead_ext" / "_C_cuda.so"
    parser.add_argument("--object", type=Path, default=library, help="library or object file")
    parser.add_argument("--to", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the output of a check")
    options = parser.parse_args(arguments)
    if options.against is not None:
        predicted = json.loads(options.to.read_text())
        print("\n".join(beside(predicted, read_lines(options.against / "timings.jsonl"))))
        return
    found = predictions(machine_code.report(options.object))
    record = options.object.with_name("_build_info.json")
    if record.is_file():
        found["csrc_sha256"] = json.loads(record.read_text())["csrc_sha256"]
    options.to.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(beside(found, [])))


if __name__ == "__main__":
    main()
