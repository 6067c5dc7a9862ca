# SPDX-License-Identifier: Apache-2.0
"""Predicted time of the decode step on an H200, from its machine code and four constants.
The prediction is to be confirmed or corrected by measurement, row by row.

``python -m tools.gpu.prediction`` writes ``benchmarks/results/predicted-h200.json``;
``python -m tools.gpu.prediction --against FOLDER`` compares it with a check's ``timings.jsonl``.

The time of a step is its start, then the longest of the concurrent terms, then its end::

    start     launch, the block's set-up, and the first bytes from memory
    correction  D h, then the corrected input of the LM head, each behind a grid barrier; the
              first stages of weights arrive meanwhile
    memory    bytes of weights, gate and cache at the chip's bandwidth
    producer  copies of the busiest block, at the stall cycles per copy of the machine code
    consumers its bytes at the rate of the loop of products: the stall cycles of a warp, or a
              scheduler's one instruction per cycle, whichever is slower
    token     dependent round trips to L2 after the last product

It leaves out contention, a gate that finishes after the first tiles, consumers that wait for shared
memory, and blocks that end at different times.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import ROOT
from .records import read_lines

BANDWIDTH, CLOCK = 4.3e12, 1.98e9  # bytes and cycles per second
MEMORY_US, L2_US = 0.8, 0.25  # latencies
BLOCKS, CONSUMERS, SCHEDULERS = 132, 8, 4
LAUNCH_US = 2.0  # of a cooperative launch in a graph, an estimate
GATE_NUMBERS = 2 * 8 * 48 + 2 * 8  # rows of the gate's matrices; the folded ones are fp32
COLUMN_BYTES = 8 * 48 * 2 + 8 * 4 + 1  # of the gate's cache, for each column
UNIT = 8  # vocabulary entries of a tile of the tensor cores
# Round trips to L2 from the last product to the token: the barrier's signal and poll, the parts of
# all blocks (their sums, then the winner's), then what is written.
TOKEN_TRIPS, SAMPLED_TRIPS = 6, 8
# Delay of a correction before its first product: two loads from memory, and the round trips of two
# barriers and of the partial sums between them.
CORRECTION_LOADS, CORRECTION_TRIPS = 2, 6
UNDER_WAY = 64 << 10  # bytes that a block has asked for meanwhile
BITS = {"bf16": 16, "fp16": 16, "int8": 8, "fp8": 8, "int4": 4}
GROUP = 128  # int4 weights that share an fp32 scale
RESULT = ROOT / "benchmarks" / "results" / "predicted-h200.json"
NOTE = (
    "A PREDICTION from machine code and four constants of the chip (tools/gpu/prediction.py). "
    "Nothing here was measured."
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
        cycles_per_copy: the producer's stall cycles per bulk copy, in the loop with most copies.
        bytes_per_copy: bytes of that copy.
        consumer_bytes_per_clock: bytes per clock that all consumers of a multiprocessor process,
            for one request.
    """

    cycles_per_copy: float
    bytes_per_copy: int
    consumer_bytes_per_clock: float


def kernel_of(report: dict[str, Any], format: str, bytes_per_copy: int) -> Kernel:
    """A :class:`Kernel` from a report of :mod:`tools.gpu.machine_code`.

    A tensor core product takes 16 x 16 weights (rows x inputs). The machine code does not show
    which loop serves one request; the slowest one is used.
    """
    copies = report["copy_loops"]
    slowest = max(copies, key=lambda loop: (loop["copies"], loop["stall_cycles_per_copy"]))
    rates = []
    for loop in report["consumer_loops"]:
        num_bytes = loop["products"] * 16 * 16 * BITS[format] / 8
        by_stalls = CONSUMERS * num_bytes / loop["stall_cycles"]
        rates.append(min(by_stalls, SCHEDULERS * num_bytes / loop["instructions"]))
    return Kernel(slowest["stall_cycles_per_copy"], bytes_per_copy, min(rates))


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


def predict(
    kernel: Kernel,
    d: int,
    V: int,
    B: int,
    format: str,
    T: int = 256,
    sampled: bool = False,
    reward_head: str = "full",
    r: int = 0,
) -> dict[str, float]:
    """Microseconds of a step and of each term."""
    heads, all_bytes = bytes_read(d, V, B, T, format, reward_head, r)
    units = -(-V // UNIT)
    if reward_head != "full":
        units = -(-units // 2)  # of both halves of the vocabulary
    busiest = -(-units // BLOCKS) / units  # share of the heads that the busiest block has
    of_block = heads * busiest
    us = 1e6 / CLOCK
    terms = {
        "start_us": LAUNCH_US + MEMORY_US + 2 * L2_US,
        "memory_us": all_bytes / BANDWIDTH * 1e6,
        "producer_us": of_block / kernel.bytes_per_copy * kernel.cycles_per_copy * us,
        "consumers_us": of_block / kernel.consumer_bytes_per_clock * us,
        "token_us": (SAMPLED_TRIPS if sampled else TOKEN_TRIPS) * L2_US,
    }
    longest = max(terms[name] for name in ("memory_us", "producer_us", "consumers_us"))
    if reward_head != "full":
        first = CORRECTION_LOADS * MEMORY_US + CORRECTION_TRIPS * L2_US
        terms["correction_us"] = max(0.0, first - UNDER_WAY * BLOCKS / BANDWIDTH * 1e6)
    total = terms["start_us"] + terms.get("correction_us", 0.0) + longest + terms["token_us"]
    return {"us": round(total, 1), **{name: round(value, 1) for name, value in terms.items()}}


def least_consumer_rate() -> float:
    """Required bytes per clock of the consumers: 1.3 times what memory delivers."""
    return 1.3 * BANDWIDTH / CLOCK / BLOCKS


def predictions(
    reports: dict[str, dict[str, Any]], bytes_per_copy: dict[str, int]
) -> dict[str, Any]:
    """The content of the file: constants, kernel properties, and a row for each timings case.

    Batches of more than 8 have separate loops, which the model does not distinguish: for them the
    consumers' term is that of one request.
    """
    from .timings import CASES

    kernels = {
        f"{format}, {kind}": kernel_of(
            reports[f"stream_kernel<{format}, 1, {number}>"], format, bytes_per_copy[format]
        )
        for format in BITS
        for number, kind in enumerate(("full", "correction"))
    }
    constants = {"bandwidth": BANDWIDTH, "clock": CLOCK, "memory_us": MEMORY_US, "l2_us": L2_US}
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
        "rows": rows,
    }


def beside(predicted: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    """A line per case: predicted, measured, goal, and the largest term of the model."""
    steps = {row["case"]: row for row in measured if row.get("contender") == "step"}
    lines = [
        "| case | predicted us | measured us | measured / predicted | goal us | largest term |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in predicted["rows"]:
        got = steps.get(row["case"], {}).get("us_median")
        terms = {name: row[name] for name in ("memory_us", "producer_us", "consumers_us")}
        largest = max(terms, key=terms.__getitem__)
        cells = [
            row["case"],
            f"{row['us']:.1f}",
            "not measured" if got is None else f"{got:.1f}",
            "" if got is None else f"{got / row['us']:.2f}",
            row.get("goal_us", ""),
            f"{largest.removesuffix('_us')} {terms[largest]:.1f}",
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
    parser.add_argument(
        "--bytes-per-copy",
        type=int,
        required=False,
        help="of the producer's bulk copies (default: a box of 64 rows of 128 bytes)",
        default=64 * 128,
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the output of a check")
    options = parser.parse_args(arguments)
    if options.against is not None:
        predicted = json.loads(options.to.read_text())
        print("\n".join(beside(predicted, read_lines(options.against / "timings.jsonl"))))
        return
    found = predictions(
        machine_code.report(options.object), dict.fromkeys(BITS, options.bytes_per_copy)
    )
    record = options.object.with_name("_build_info.json")
    if record.is_file():
        found["csrc_sha256"] = json.loads(record.read_text())["csrc_sha256"]
    options.to.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(beside(found, [])))


if __name__ == "__main__":
    main()
