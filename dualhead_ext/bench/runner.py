# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks into a report: what both front ends share."""

from __future__ import annotations

from collections.abc import Callable

from . import QUICK_SECONDS, SECONDS, cases, contenders, decode, generation, loss, machine, report

# Calls per contender and case that a figure of a GPU is the median of, at least.
GPU_ROUNDS = 100


def run(quick: bool, seconds: float | None, emit: Callable[[str], None]) -> report.Report:
    """Run all benchmarks; ``emit`` gets text as it comes.

    Args:
        seconds: of timing per case, None for the default.
    """
    found = start(quick, emit)
    for group in cases.plan(quick):
        run_group(group, found, seconds, emit)
    for group in () if quick else cases.growth_plan():
        run_growth(group, found, seconds, emit)
    for case in loss.plan(quick):
        run_loss(case, found, seconds, emit)
    for model in generation.plan(quick):
        run_model(model, found, seconds, emit)
    return found


def run_gpu(
    quick: bool,
    seconds: float | None,
    emit: Callable[[str], None],
    path: str | None = None,
    device_type: str = "cuda",
) -> report.Report:
    """The decode step and the training loss on a GPU, all of it twice, to know the spread.

    Args:
        path: of the results file, which is written after each group: what was measured stays.
        device_type: "cpu" runs the very same over contenders without graphs.
    """
    found = start(quick, emit, device_type)
    found.copy_gb_per_s = machine.copy_bandwidth(device_type)
    for again in (False, True):
        if again:
            found.begin_again()
        for group in cases.gpu_plan(quick):
            run_group(group, found, seconds, emit, device_type, min_rounds=GPU_ROUNDS)
            if path is not None:
                found.write(path)
        for case in loss.gpu_plan(quick):
            run_loss(case, found, seconds, emit, device_type)
            if path is not None:
                found.write(path)
    return found


def start(quick: bool, emit: Callable[[str], None], device_type: str = "cpu") -> report.Report:
    """An empty report of this machine."""
    found = report.Report(machine.describe(device_type), quick)
    emit(report.environment_lines(found.environment))
    return found


def run_group(
    group: cases.Group,
    found: report.Report,
    seconds: float | None,
    emit: Callable[[str], None],
    device_type: str = "cpu",
    min_rounds: int = 15,
    add: Callable[[decode.CaseResult, machine.ReadBandwidth], str] | None = None,
) -> None:
    """One group of the decode benchmark: make its weights; find how this machine reads memory
    fastest, over those very weights; time each case, that loop beside it.

    Args:
        add: takes in a result, default ``found.add``.
    """
    effort = decode.Effort(
        seconds=_seconds(found, seconds),
        cold_bytes=machine.cold_bytes(device_type),
        cache_bytes=machine.last_level_cache_bytes(device_type),
        min_rounds=min_rounds,
    )
    operands = contenders.Operands(group, effort.cold_bytes, device_type)
    read = machine.read_bandwidth(operands.memory)
    emit(report.group_lines(operands, effort, read))
    for case in group.cases:
        result = decode.run_case(case, operands, effort, read)
        emit((add or found.add)(result, result.read))


def run_growth(
    group: cases.Group, found: report.Report, seconds: float | None, emit: Callable[[str], None]
) -> None:
    """One group of :func:`.cases.growth_plan`."""
    run_group(group, found, seconds, emit, add=found.add_growth)


def run_loss(
    case: loss.LossCase,
    found: report.Report,
    seconds: float | None,
    emit: Callable[[str], None],
    device_type: str = "cpu",
) -> None:
    """One case of the training loss."""
    per_case = 10 * _seconds(found, seconds)
    emit(found.add_loss(loss.run_case(case, seconds=per_case, device_type=device_type)))


def run_model(
    model: generation.Model,
    found: report.Report,
    seconds: float | None,
    emit: Callable[[str], None],
) -> None:
    """One whole model."""
    per_contender = 2 * _seconds(found, seconds)
    emit(found.add_model(generation.run_model(model, seconds=per_contender)))


def _seconds(found: report.Report, seconds: float | None) -> float:
    return seconds if seconds is not None else QUICK_SECONDS if found.quick else SECONDS
