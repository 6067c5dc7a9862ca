# SPDX-License-Identifier: Apache-2.0
"""Benchmark results as text for a terminal, as JSON and as Markdown.

The JSON is described in benchmarks/results/README.md.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables

if TYPE_CHECKING:
    from ..measurement.machine import ReadBandwidth
    from .comparisons import Contest
    from .contenders import Operands
    from .decode import CaseResult, Effort
    from .generation import ModelResult
    from .loss import LossResult
    from .training import TrainingResult

# Names of quantised formats in results files; importing them from `quantization` would need torch.
QUANTIZED = ("int8", "fp8", "int4")
_COLUMNS = "{:>3} {:>5} {:<8} {:<9} {:>9} {:>19} {:>9} {:>13} {:>6} {:>5}"


@dataclass
class Report:
    """The results of a benchmark run so far.

    Attributes:
        environment: :func:`dualhead_ext.measurement.machine.describe`.
        quick: whether the quick plan ran; its figures should not be quoted.
        cases, loss, generate, training: rows, plain dicts.
        corrections: rows of correction reward heads, each with its goals.
        growth: the rows of :func:`.cases.growth_plan`, which have no required speed-up.
        copy_gb_per_s: the device's copy bandwidth; None if it was not measured.
        failures: one sentence per missed requirement.
    """

    environment: dict[str, Any]
    quick: bool = False
    cases: list[dict[str, Any]] = field(default_factory=list)
    loss: list[dict[str, Any]] = field(default_factory=list)
    generate: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    copy_gb_per_s: float | None = None
    growth: list[dict[str, Any]] = field(default_factory=list)
    corrections: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: CaseResult, read: ReadBandwidth) -> str:
        """Add the result of a decode case; returns the lines to print."""
        self.cases.extend(result.rows(read))
        failure = result.failure(read)
        self.failures += [failure] if failure else []
        return case_lines(result, read) + (f"\n    TOO SLOW: {failure}" if failure else "")

    def add_growth(self, result: CaseResult, read: ReadBandwidth) -> str:
        """Add the result of a case of the growth plan; returns the lines to print."""
        self.growth.extend(result.rows(read))
        return case_lines(result, read)

    def add_loss(self, result: LossResult) -> str:
        """Add the result of a training loss case; returns the lines to print."""
        self.loss.extend(result.rows())
        self.failures += result.failures()
        return result.text()

    def add_model(self, result: ModelResult) -> str:
        """Add the result of a whole model; returns the lines to print."""
        self.generate += result.rows()
        self.failures += result.failures()
        return result.text()

    def add_training(self, result: TrainingResult) -> str:
        """Add the result of a training case; returns the lines to print."""
        self.training += result.rows()
        self.failures += result.failures()
        return result.text()

    def add_contest(self, contest: Contest) -> str:
        """Add the result of a corrections case; returns the lines to print."""
        self.corrections += contest.rows()
        self.failures += contest.failures()
        return contest.text()

    def as_json(self) -> dict[str, Any]:
        """All results as plain values."""
        gpu = {"copy_gb_per_s": self.copy_gb_per_s}
        return {
            **self.environment,
            **(gpu if self.copy_gb_per_s is not None else {}),
            "quick": self.quick,
            "read_gb_per_s": max((row["read_gb_per_s"] for row in self.cases), default=None),
            "cases": self.cases,
            "loss": self.loss,
            "generate": self.generate,
            **({"training": self.training} if self.training else {}),
            **({"growth": self.growth} if self.growth else {}),
            **({"corrections": self.corrections} if self.corrections else {}),
            "failures": self.failures,
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON atomically."""
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        part.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        os.replace(part, target)


def environment_lines(environment: dict[str, Any]) -> str:
    """The machine and the software, in three lines."""
    return (
        f"{environment['device']}, {environment['cores']} cores, {environment['threads']} threads, "
        f"last-level cache {environment['last_level_cache_bytes'] / 2**20:.0f} MiB, "
        f"load {environment['load_average']}\n"
        f"torch {environment['torch']}, Python {environment['python']}, kernels "
        f"{environment['isa']} ({environment['kind']}), {environment['compiler']}\n"
        f"commit {environment['commit']}, csrc {str(environment['csrc_sha256'])[:12]}"
    )


def group_lines(operands: Operands, effort: Effort, read: ReadBandwidth) -> str:
    """The heading of a group's table."""
    copies = len(operands.copies)
    spanned = copies * operands.num_bytes
    how = f"{copies} copies in turn, {spanned / effort.cache_bytes:.1f} times the last-level cache"
    if spanned < 2 * effort.cache_bytes:
        how += ", NOT COLD: too little free memory"
    return (
        f"\n{operands.group}: {operands.num_bytes / 1e6:.1f} MB of weights ({how}); "
        f"this machine reads {read.gb_per_s:.1f} GB/s ({read.method})\n"
    ) + _COLUMNS.format(
        *("B", "T", "token", "contender", "median ms", "quartiles", "dualhead", "95 %"),
        *("of bw", "n"),
    )


def case_lines(result: CaseResult, read: ReadBandwidth) -> str:
    """A case's rows. The column "dualhead" says how many times as long the contender takes as the
    fused step."""
    lines = []
    for name, timing in result.timings.items():
        against = result.speedup(name)
        same = name == "dualhead"
        lines.append(
            _COLUMNS.format(
                result.case.B,
                result.case.T,
                "sampled" if result.case.sampled else "greedy",
                name,
                f"{timing.us_median / 1e3:.3f}",
                f"{timing.us_q1 / 1e3:.3f}..{timing.us_q3 / 1e3:.3f}",
                "" if same else f"{against.value:.2f}x",
                "" if same else f"{against.low:.2f}..{against.high:.2f}",
                f"{read.share(result.num_bytes[name], timing.us_median):.0%}",
                timing.repeats,
            )
            + (f"  ({result.compile_options})" if name == "compile" else "")
        )
    return "\n".join(lines)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: not JSON, or not a results file.
        OSError: the file cannot be read.
    """
    try:
        results = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"benchmark: {path} must be JSON: {error}") from error
    needed = {"device", "cases"}
    if not isinstance(results, dict) or not needed <= results.keys():
        raise ValueError(f"benchmark: {path} must be a results file, with {sorted(needed)}")
    return results


def grouped(results: dict[str, Any]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """Rows of a results file by case (d, V, format, B, T, sampled) and contender."""
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in results["cases"]:
        key = (row["d"], row["V"], row["format"], row["B"], row["T"], row["sampled"])
        cases.setdefault(key, {})[row["contender"]] = row
    return cases


def is_gpu(results: dict[str, Any]) -> bool:
    """Whether the results are from a GPU."""
    return "driver" in results


def markdown(results: dict[str, Any]) -> str:
    """A results file as Markdown tables: milliseconds (on a GPU, microseconds), and how many times
    as long each contender takes as the fused step."""
    lines = _case_lines(results) if results["cases"] else []
    for key, table in (
        ("loss", tables.loss_lines),
        ("generate", tables.model_lines),
        ("training", tables.training_lines),
        ("corrections", tables.correction_lines),
    ):
        lines += ["", *table(results[key])] if results.get(key) else []
    return "\n".join([*lines, "", _footer(results), *_gpu_lines(results)]).lstrip("\n")


def _case_lines(results: dict[str, Any]) -> list[str]:
    present = {row["contender"] for row in results["cases"]}
    graphs = [name for name in ("two_gemms", "one_gemm") if name in present]
    others = {"eager": "eager", "compile": "torch.compile"}
    others |= {name: name.replace("_", " ") for name in graphs} | {"lm_head": "lm_head alone"}
    titles = ["d x V", "weights", "B", "T", "token", "dualhead", "of read bandwidth"]
    titles += others.values()
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    scale, form = (1.0, "{:.1f} us") if is_gpu(results) else (1e-3, "{:.2f} ms")
    cases = grouped(results)
    for (d, V, name, B, T, sampled), rows in cases.items():
        ours = rows["dualhead"]
        if name in QUANTIZED:  # beside the same contenders in bf16
            rows = cases[d, V, "bf16", B, T, sampled]
        cells = [f"{d} x {V}", name, B, T, "sampled" if sampled else "greedy"]
        cells += [form.format(ours["us_median"] * scale), f"{ours['share_of_read_bandwidth']:.0%}"]
        for contender in others:
            row = rows.get(contender)
            times = row and row["us_median"] / ours["us_median"]
            shown = row and form.format(row["us_median"] * scale)
            cells.append(f"{shown}, {times:.2f}x" if row else "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _footer(results: dict[str, Any]) -> str:
    read, cold = results.get("read_gb_per_s"), "; weights cold" if results["cases"] else ""
    return (
        f"{results['device']}, {results.get('cores')} cores, {results.get('threads')} threads"
        + ("" if read is None else f", reads {read:.1f} GB/s")
        + f"; torch {results.get('torch')}, kernels {results.get('isa')}"
        + (f" ({results['kind']})" if results.get("kind") else "")
        + ", commit "
        f'{results.get("commit")}. Medians{cold}. "1.50x": takes 1.50 times as long as dualhead.'
    )


def _gpu_lines(results: dict[str, Any]) -> list[str]:
    """The lines for a GPU only: driver, copy bandwidth, steps of gpu-check."""
    if not is_gpu(results):
        return []
    copies = results.get("copy_gb_per_s")
    speed = f"copies {copies:.0f} GB/s" if copies else "copy bandwidth not measured"
    lines = ["", f"driver {results['driver']}, CUDA {results.get('cuda')}; {speed}."]
    if results.get("steps"):
        lines += ["", "| step | outcome | seconds | |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {step['name']} | {step['outcome']} | {step['seconds']:.0f} | {step['detail']} |"
            for step in results["steps"]
        ]
    return lines


def stale(results: dict[str, Any], csrc_sha256: str) -> str | None:
    """A sentence if a GPU's results were measured on other sources; None otherwise or on a CPU."""
    if not is_gpu(results) or results.get("csrc_sha256") == csrc_sha256:
        return None
    return (
        f"the results of {results['device']} were measured on other sources (csrc "
        f"{str(results.get('csrc_sha256'))[:12]}, now {csrc_sha256[:12]}): run `make gpu-check` "
        "there again before quoting them"
    )
