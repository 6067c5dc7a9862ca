# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks and fills a report; shared by both front ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..bench import QUICK_SECONDS, SECONDS
from ..measurement import machine
from . import (
    cases,
    contenders,
    correction_files,
    correction_losses,
    correction_models,
    correction_steps,
    decode,
    generation,
    loss,
    loss_cases,
    report,
    training,
    training_cases,
)
from .comparisons import Contest

# Minimum number of calls per contender and case on a GPU: of a decode step, and of a whole model,
# whose calls take seconds.
GPU_ROUNDS, MODEL_ROUNDS = 100, 8


def run(
    quick: bool,
    seconds: float | None,
    emit: Callable[[str], None],
    parts: Sequence[str] = ("decode", "loss", "models"),
    path: str | None = None,
) -> report.Report:
    """Run the CPU benchmarks; ``emit`` gets the text of each result at once.

    Args:
        seconds: seconds of timing per case; None for the default.
        parts: names from :data:`~dualhead_ext.bench.PARTS`.
        path: path of the results file, written after each case of the part corrections, which
            takes an hour; None to write none.
    """
    found = start(quick, emit)
    if "decode" in parts:
        for group in cases.plan(quick):
            run_group(group, found, seconds, emit)
        for group in () if quick else cases.growth_plan():
            run_growth(group, found, seconds, emit)
    for case in loss_cases.plan(quick) if "loss" in parts else ():
        run_loss(case, found, seconds, emit)
    for model in generation.plan(quick) if "models" in parts else ():
        run_model(model, found, seconds, emit)
    for steps in training_cases.plan(quick) if "training" in parts else ():
        run_training(steps, found, seconds, emit)
    for contest in _corrections(quick, _seconds(found, seconds)) if "corrections" in parts else ():
        emit(found.add_contest(contest))
        if path is not None:
            found.write(path)
    return found


def _corrections(quick: bool, seconds: float) -> Iterator[Contest]:
    """Correction reward heads: files, decode steps, the training loss, whole models."""
    yield correction_files.run_case(correction_files.TINY if quick else correction_files.SHAPE)
    cold = machine.cold_bytes()
    for step in correction_steps.plan(quick):
        yield correction_steps.run_case(step, seconds=10 * seconds, cold_bytes=cold)
    for batch in correction_losses.plan(quick):
        yield correction_losses.run_case(batch, seconds=10 * seconds)
    for model in correction_models.plan(quick):
        yield from correction_models.run_case(model, seconds=2 * seconds)


def run_gpu(
    quick: bool,
    seconds: float | None,
    emit: Callable[[str], None],
    path: str | None = None,
    device_type: str = "cuda",
    parts: Sequence[str] | None = None,
) -> report.Report:
    """Run the GPU benchmarks; arguments not listed are those of :func:`run`.

    Args:
        path: path of the results file, written after each case; None to write none.
        device_type: "cpu" runs the same cases without CUDA graphs.
        parts: names from :data:`~dualhead_ext.bench.PARTS`; the loss includes
            :func:`.loss_cases.gpu_variants`. None: the decode step and the training loss, without
            the variants.
    """
    found = start(quick, emit, device_type)
    if parts is None or "decode" in parts:
        found.copy_gb_per_s = machine.copy_bandwidth(device_type)

    def emit_and_write(text: str) -> None:
        emit(text)
        if path is not None:
            found.write(path)

    for part in parts or ("decode", "loss"):
        run, wanted, options = _gpu_work(part, quick, variants=parts is not None)
        for case in wanted:
            run(case, found, seconds, emit_and_write, device_type, **options)
    return found


def _gpu_work(part: str, quick: bool, variants: bool) -> tuple[Callable[..., None], list, dict]:
    """The function that runs a part on a GPU, its cases, and its options."""
    if part == "decode":
        return run_group, cases.gpu_plan(quick), {"min_rounds": GPU_ROUNDS}
    if part == "loss":
        wanted = loss_cases.gpu_plan(quick)
        if not variants:
            return run_loss, wanted, {}
        # Compiling takes longer than everything else: do it last, for the first case only.
        others = [replace(c, compile=False) for c in wanted + loss_cases.gpu_variants(quick)]
        return run_loss, others + [case for case in wanted[:1] if case.compile], {}
    if part == "models":
        return run_model, generation.gpu_plan(quick), {"min_rounds": MODEL_ROUNDS}
    return run_training, training_cases.gpu_plan(quick), {"min_rounds": MODEL_ROUNDS}


def start(quick: bool, emit: Callable[[str], None], device_type: str = "cpu") -> report.Report:
    """An empty report that describes this machine."""
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
    """Run one group of the decode benchmark.

    Creates the weights, finds the fastest read loop over them, and times each case together with
    read loops.

    Args:
        add: adds a result to the report; default ``found.add``.
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
    """Run one group of :func:`.cases.growth_plan`."""
    run_group(group, found, seconds, emit, add=found.add_growth)


def run_loss(
    case: loss_cases.LossCase,
    found: report.Report,
    seconds: float | None,
    emit: Callable[[str], None],
    device_type: str = "cpu",
) -> None:
    """Run one case of the training loss."""
    per_case = 10 * _seconds(found, seconds)
    emit(found.add_loss(loss.run_case(case, seconds=per_case, device_type=device_type)))


def run_model(
    model: generation.Model,
    found: report.Report,
    seconds: float | None,
    emit: Callable[[str], None],
    device_type: str = "cpu",
    min_rounds: int = 5,
) -> None:
    """Run one whole model."""
    result = generation.run_model(
        model,
        seconds=2 * _seconds(found, seconds),
        min_rounds=min_rounds,
        device_type=device_type,
    )
    emit(found.add_model(result))


def run_training(
    case: training_cases.TrainingCase,
    found: report.Report,
    seconds: float | None,
    emit: Callable[[str], None],
    device_type: str = "cpu",
    min_rounds: int = 5,
) -> None:
    """Run one case of training steps."""
    result = training.run_case(
        case,
        seconds=10 * _seconds(found, seconds),
        min_rounds=min_rounds,
        device_type=device_type,
    )
    emit(found.add_training(result))


def _seconds(found: report.Report, seconds: float | None) -> float:
    return seconds if seconds is not None else QUICK_SECONDS if found.quick else SECONDS
