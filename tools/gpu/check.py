# SPDX-License-Identifier: Apache-2.0
"""The checks that need a GPU, in stages, the most important first: ``make gpu-check``,
``make gpu-recheck``, ``make gpu-models``.

``python -m tools.gpu.check [check|recheck|training|models|loss] --output FOLDER``. Each result is
written to the folder at once, so killing the program loses only what was not measured yet:

- ``stages.jsonl``: the machine, then the outcome of each stage.
- ``smoke.jsonl``, ``timings.jsonl``, ``benchmark.jsonl``, ``tests.jsonl`` (sampling statistics
  too): one line per case, contender or test.
- ``ncu.txt``, ``sanitizers.txt``: the output of these tools. ``log.txt``: all output.

The time limits add up to more than the budget: a slow stage leaves less time to later ones, but
never less than the seconds reserved for each. Exit code: 0 if all passed, 1 if not, 3 with a
message if there is no GPU. :mod:`tools.gpu.results` makes a results file from the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import counters, sanitizers
from .processes import ROOT, Limits, end_all, go_through, run_command
from .records import DID_NOT_RUN, FAILED, PASSED, TIMED_OUT, read_lines, tail
from .stages import Cases, Output, Stage, Stages, python

NO_GPU = 3
# Seconds of a whole run, and how many of them are reserved for copying files.
SECONDS = {"check": 465.0, "recheck": 192.0, "training": 192.0, "models": 192.0, "loss": 192.0}
SMOKE_SECONDS, TIMING_SECONDS, TEST_SECONDS, BENCHMARK_SECONDS = 20.0, 25.0, 45.0, 25.0
SAMPLING = "python_tests/csrc/test_cuda_sampling.py"
PARALLEL = 4  # processes side by side on the GPU
CPU_PATIENCE = 4  # factor of the stages' time limits on the CPU, which may be busy


@dataclass
class Check:
    """A run: its options and where its results go.

    Attributes:
        device: "cpu" runs everything but the GPU tools, at small sizes, to test this program.
        build: whether to build even if the existing libraries load.
        smoke, tests: cases and tests to run; empty for all.
        commit: commit of the sources, if known.
        found: the output of :mod:`.machine`.
        import_seconds: time that a process takes to import torch and the package.
    """

    output: Output
    device: str = "cuda"
    build: bool = True
    smoke: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    commit: str | None = None
    found: dict[str, Any] | None = None
    import_seconds: float = 10.0

    @property
    def toy(self) -> bool:
        return self.device == "cpu"

    @property
    def parallel(self) -> int:
        return 1 if self.toy else PARALLEL

    def worker(self, module: str) -> Any:
        """A function from cases to the command of a worker that runs them."""
        options = ["--device", self.device, *(["--toy"] if self.toy else [])]
        return lambda cases: python(module, *cases, *options)

    # --- load -------------------------------------------------------------------------------------

    def load(self, end_time: float) -> tuple[str, str]:
        """Build (with ``build`` False only if the existing libraries do not load); describe the
        machine."""
        found, built = self.found, ""
        if found is None:  # the stages may run all the same
            return FAILED, "the machine cannot be described"
        if self.build or found["problem"]:
            self.output.say(f"load: building ({found['problem'] or 'asked for'})")
            done = run_command(
                [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
                end_time - time.monotonic() - 20,
                _build_environment(found["arch"]),
            )
            self.output.log(done.text)
            if done.code != 0:
                return FAILED, f"the build failed ({done.why}): {done.last_line.strip()}"
            found, built = describe(self.device, end_time - time.monotonic()), "built; "
        if found is None or found["problem"]:
            return FAILED, found["problem"] if found else "the machine cannot be described again"
        self.import_seconds = found["import_seconds"]
        environment = found["environment"] | ({"commit": self.commit} if self.commit else {})
        self.output.stages.add(environment=environment)
        same = environment["csrc_sha256"] == environment["sources_sha256"]
        stale = "" if same else "; THE LIBRARIES ARE OF OTHER SOURCES THAN csrc/"
        device, driver = environment["device"], environment.get("driver")
        return PASSED, f"{built}{device}, driver {driver}, import {self.import_seconds} s{stale}"

    # --- cases ------------------------------------------------------------------------------------

    def run_smoke(self, end_time: float) -> tuple[str, str]:
        """Run each case in its own process, several in parallel."""
        from .smoke import CASES

        names = self.smoke or [name for name in CASES if self._can_smoke(name)]
        cases = Cases(self.output, "smoke", "smoke")
        limits = Limits(self.import_seconds * 3 + 15, SMOKE_SECONDS, end_time)
        command = self.worker("tools.gpu.smoke")
        each = [[name] for name in names]
        _side_by_side(self.parallel, command, each, limits, cases, self.output.log)
        return cases.outcome()

    def _can_smoke(self, name: str) -> bool:
        return not self.toy or not name.startswith("fp16")

    def run_timings(self, end_time: float, names: tuple[str, ...] = ()) -> tuple[str, str]:
        """Run all cases in one process; a new one replaces it only if it dies."""
        from .timings import CASES, FIVE

        cases = Cases(self.output, "timings", "timings")
        names = names or (FIVE[:2] if self.toy else tuple(CASES))
        limits = Limits(self.import_seconds * 2 + 15, TIMING_SECONDS, end_time)
        go_through(self.worker("tools.gpu.timings"), names, limits, cases, self.output.log)
        return cases.outcome()

    def run_five_twice(self, end_time: float) -> tuple[str, str]:
        """Run the five goal cases twice more, in separate processes, to measure the spread."""
        from .timings import FIVE

        middle = (time.monotonic() + end_time) / 2
        outcomes = [self.run_timings(middle, FIVE), self.run_timings(end_time, FIVE)]
        worst = next((found for found in outcomes if found[0] != PASSED), outcomes[0])
        return worst[0], "; ".join(detail for _, detail in outcomes)

    def run_benchmark(self, end_time: float, compiled: bool = False) -> tuple[str, str]:
        """Run the benchmark case by case: only torch.compile's cases, or all others."""
        from . import benchmark

        cases = Cases(self.output, "benchmark", "benchmark")
        names = [n for n in benchmark.plan(self.toy) if n.endswith("-compile") == compiled]
        case = BENCHMARK_SECONDS if not compiled else 150.0
        limits = Limits(self.import_seconds * 2 + 15, case, end_time)
        chosen = names[:1] if compiled else names
        go_through(self.worker("tools.gpu.benchmark"), chosen, limits, cases, self.output.log)
        return cases.outcome()

    # --- tests ------------------------------------------------------------------------------------

    def run_tests(self, end_time: float) -> tuple[str, str]:
        """Run the tests marked cuda, or the named ones, in several parallel processes."""
        files = [path for path in _files_of_gpu_tests() if path != SAMPLING]
        if self.toy:
            files = ["python_tests/ops/test_skipping.py"]
        return self._pytest("tests", self.tests or files, TEST_SECONDS, self.parallel, end_time)

    def run_sampling(self, end_time: float) -> tuple[str, str]:
        """Run the statistical tests of sampling."""
        if self.toy:
            return DID_NOT_RUN, "needs a GPU"
        return self._pytest("sampling", [SAMPLING], TEST_SECONDS, 2, end_time)

    def _pytest(
        self, stage: str, wanted: list[str], seconds: float, parallel: int, end_time: float
    ) -> tuple[str, str]:
        marks = ["-m", "not cuda"] if self.toy else ["-m", "cuda", "--require-cuda"]
        # pytest-benchmark, if installed, has options with the same names as ours.
        base = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *marks]
        collect = python("pytest", *base, "--collect-only", *wanted)
        done = run_command(collect, min(90.0, end_time - time.monotonic()))
        self.output.log(done.text)
        tests = [line.strip() for line in done.text.splitlines() if _is_test(line)]
        if not tests:
            return FAILED, f"no test was collected ({done.why}): {tail(done.text, 3)}"
        cases = Cases(self.output, "tests", stage, quiet=True)
        limits = Limits(self.import_seconds * 3 + 40, seconds, end_time)
        hang = ["-o", f"faulthandler_timeout={seconds - 3:.0f}", "-p", "tools.gpu.worker"]

        def command(names: list[str]) -> list[str]:
            return python("pytest", *base, *hang, *names)

        parts = [tests[first::parallel] for first in range(min(parallel, len(tests)))]
        _side_by_side(parallel, command, parts, limits, cases, self.output.log)
        for file in sorted({test.partition("::")[0] for test in tests}):
            of_file = [r["outcome"] for r in cases.ended if r["case"].startswith(f"{file}::")]
            counts = {word: of_file.count(word) for word in sorted(set(of_file))}
            self.output.lines("tests").add(stage=stage, file=file, **counts)
            self.output.say(f"{stage} {file}: {counts}")
        return cases.outcome()

    # --- long benchmarks --------------------------------------------------------------------------

    def run_decoding(self, end_time: float) -> tuple[str, str]:
        """Time a model of 7B size with the default cache."""
        cases = Cases(self.output, "benchmark", "decoding")
        limits = Limits(self.import_seconds * 3 + 15, 60, end_time)
        command = self.worker("tools.gpu.decoding")
        go_through(command, ["eager"], limits, cases, self.output.log)
        return cases.outcome()

    def run_part(self, part: str, end_time: float, *options: str) -> tuple[str, str]:
        """Run one part of `dualhead bench`, which writes its file after each case."""
        path = self.output.folder / f"{part}.json"
        command = python("dualhead_ext.cli", "bench", "--device", self.device, "--part", part)
        done = run_command(
            [*command, "--json", str(path), *options], end_time - time.monotonic(), seen=self._show
        )
        if done.code is None:
            return TIMED_OUT, f"rows until then are in {path.name}"
        return PASSED if done.code == 0 else FAILED, tail(done.text, 2)

    def _show(self, line: str) -> None:
        if line.strip():
            self.output.say(line.rstrip())


def _side_by_side(
    parallel: int,
    command: Any,
    parts: list[list[str]],
    limits: Limits,
    record: Cases,
    log: Callable[[str], None],
) -> None:
    """:func:`go_through` several parts in parallel."""
    with ThreadPoolExecutor(parallel) as pool:
        work = [pool.submit(go_through, command, part, limits, record, log) for part in parts]
        for future in work:
            future.result()


def _is_test(line: str) -> bool:
    return "::" in line and line.startswith("python_tests/")


def _files_of_gpu_tests() -> list[str]:
    files = sorted((ROOT / "python_tests").rglob("test_*.py"))
    marked = [path for path in files if "pytest.mark.cuda" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in marked if path.name != "test_conftest.py"]


def failed_tests(folder: Path) -> list[str]:
    """The tests of an earlier run that did not pass."""
    rows = read_lines(folder / "tests.jsonl")
    return [r["case"] for r in rows if r.get("outcome") in (FAILED, TIMED_OUT)]


def plan(check: Check, mode: str) -> list[Stage]:
    """The stages of a run after loading."""
    if mode == "check":
        return [
            Stage("smoke", 75, 40, check.run_smoke),
            Stage("timings", 75, 30, check.run_timings),
            Stage("counters", 45, 25, lambda end: counters.run(check.output, end)),
            Stage("tests", 115, 60, check.run_tests),
            Stage("sampling", 50, 20, check.run_sampling),
            Stage("benchmark", 110, 55, check.run_benchmark),
            Stage("sanitizers", 120, 75, lambda end: sanitizers.run(check.output, end)),
        ]
    if mode == "recheck":
        compiled = Stage("compile", 45, 20, lambda end: check.run_benchmark(end, compiled=True))
        model = Stage("model", 60, 30, check.run_decoding)
        tests = [Stage("tests", 45, 20, check.run_tests)] if check.tests else []
        return [
            Stage("smoke", 45, 25, check.run_smoke),
            *tests,
            Stage("timings", 80, 50, check.run_five_twice),
            compiled,
            model,
        ]
    options = ["--seconds", "0.5"] if mode == "loss" else []
    return [Stage(mode, 190, 100, lambda end: check.run_part(mode, end, *options))]


def describe(device: str, limit: float) -> dict[str, Any] | None:
    """The output of :mod:`.machine`; None if it fails."""
    done = run_command(python("tools.gpu.machine", device), limit)
    for line in reversed(done.text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    print(done.text, file=sys.stderr)
    return None


def _build_environment(arch: str | None) -> dict[str, str]:
    """Environment to build for this GPU only, which takes a third of the time."""
    if arch is None:
        return {"DUALHEAD_CUDA": "0"}
    return {"DUALHEAD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.check")
    parser.add_argument("mode", nargs="?", choices=list(SECONDS), default="check")
    parser.add_argument("--output", type=Path, metavar="FOLDER", required=True)
    parser.add_argument(
        "--no-build", action="store_true", help="use the existing libraries if they load"
    )
    parser.add_argument("--seconds", type=float, help="limit of the whole run (default: by mode)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run only these stages")
    parser.add_argument(
        "--smoke", nargs="+", default=[], metavar="CASE", help="these and no others"
    )
    parser.add_argument("--tests", nargs="+", default=[], metavar="TEST", help="these only")
    parser.add_argument(
        "--failed-in", type=Path, metavar="FOLDER", help="the tests that failed in that output"
    )
    parser.add_argument("--commit", help="commit of the sources, if there is no repository")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    start = time.monotonic()
    options = _parse(arguments)
    target = f"gpu-{options.mode}"
    found = describe(options.device, 150)
    if found is not None and found["missing"]:
        print(f"{target}: no GPU to check: {found['missing']}.", file=sys.stderr)
        return NO_GPU
    output = Output(options.output, target, start)
    tests = options.tests + (failed_tests(options.failed_in) if options.failed_in else [])
    check = Check(
        output,
        device=options.device,
        build=not options.no_build,
        smoke=options.smoke,
        tests=tests,
        commit=options.commit,
        found=found,
    )
    stages = Stages(output, options.seconds or SECONDS[options.mode], start)
    signal.signal(signal.SIGTERM, lambda *_: _stop(143))
    try:
        load = Stage("load", 260 if check.build else 120, 20, check.load)
        stages.run([load])
        wanted = plan(check, options.mode)
        if check.toy:
            wanted = [replace(stage, limit=CPU_PATIENCE * stage.limit) for stage in wanted]
        if options.only:
            wanted = [stage for stage in wanted if stage.name in options.only]
        if stages.passed or found is None:
            stages.run(wanted)
        else:
            for stage in wanted:
                stages.note(stage.name, DID_NOT_RUN, "loading failed", 0.0)
    except KeyboardInterrupt:
        _stop(130)
    finally:
        end_all()
    output.say("passed" if stages.passed else "NOT passed")
    return 0 if stages.passed else 1


def _stop(code: int) -> None:
    end_all()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
