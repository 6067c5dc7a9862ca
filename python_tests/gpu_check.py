# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check``: everything that only a GPU can show, in the current Python's environment, in
under nine minutes, into ``benchmarks/results/<gpu>.json``.

Builds for this GPU, runs the GPU tests with none skipped, the sampling statistics, the benchmark,
compute-sanitizer and the rest of the suite. Each step has a time limit of its own, and its outcome
is in the file even if a later one fails. Exits with 1 if any did not pass, and with 3 and one
sentence where there is no GPU to check (make itself then says "Error 3").
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_sanitize import TOOLS, sanitize
from gpu_steps import PASSED, ROOT, Step, Steps, Suite, of_command, run_command

NO_GPU = 3
SECONDS = 520  # of nine minutes
RESULTS = ROOT / "benchmarks" / "results"


def missing() -> str | None:
    """Why the GPU tests cannot run here, as one sentence."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed in the environment of {sys.executable}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def results_path(device: str, suffix: str = "") -> Path:
    """ "NVIDIA H200" -> benchmarks/results/nvidia-h200.json."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}{suffix}.json"


class Results:
    """The results file as it grows: what describes the machine, the benchmark's part, the steps."""

    target, seconds = "gpu-check", SECONDS

    def __init__(self, path: Path, environment: dict[str, Any], part: Path) -> None:
        self.path, self.environment, self.part = path, environment, part
        self.suite = Suite(part.parent)
        self.steps = Steps(self.seconds, self.write, self.target)

    def measured(self) -> dict[str, Any]:
        """What the steps have left in files so far, and the suite's counts."""
        benchmark = json.loads(self.part.read_text()) if self.part.is_file() else {"cases": []}
        return benchmark | {"tests": self.suite.tests}

    def write(self) -> None:
        """Write what there is, whole or not at all."""
        found = {**self.measured(), **self.environment, "steps": self.steps.rows}
        whole = self.path.with_name(f".{self.path.name}.part")
        whole.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(whole, self.path)


_DESCRIBE = """
import json, sys
sys.path[:0] = [".", "_build"]
from libraries import csrc_hash
from dualhead_ext.bench import machine
print(json.dumps({**machine.describe(sys.argv[1]), "csrc_sha256": csrc_hash()}))
"""


def environment_of(device_type: str) -> dict[str, Any]:
    """What the file says about device, driver, versions and sources. In a process of its own: what
    is built in between must not be loaded here."""
    done = run_command([sys.executable, "-c", _DESCRIBE, device_type], 60)
    if done.code != 0:
        raise RuntimeError(f"the machine cannot be described: {done.last_line}")
    return json.loads(done.last_line_whole)


def build_step() -> Step:
    """Build for this GPU alone, which takes a third of the time."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{'a' * (major == 9)}")
    os.environ["DUALHEAD_CUDA"] = "1"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return Step("build", 200, of_command(command))


def plan(results: Results) -> list[list[Step]]:
    """The steps after the build; those of one list side by side. The benchmark runs alone."""
    suite, folder = results.suite, results.part.parent
    gpu = ["--require-cuda", "-m", "cuda"]
    bench = [sys.executable, "-m", "dualhead_ext.cli", "bench", "--device", "cuda"]
    statistics = "python_tests/test_cuda_sampling.py"
    tools = [
        Step(tool, 150, lambda limit, tool=tool: sanitize(tool, _made(folder / tool), limit))
        for tool in TOOLS
    ]
    shards = suite.shards(max(1, (os.cpu_count() or 2) // 2 - len(tools)), 260)
    return [
        [suite.step("GPU tests", 120, [*gpu, "python_tests", f"--ignore={statistics}"])],
        [suite.step("sampling statistics", 90, [*gpu, statistics])],
        [Step("benchmark", 170, of_command([*bench, "--json", str(results.part)]))],
        [*tools, *shards],
    ]


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def check(
    results: Results,
    build: Step,
    later: list[list[Step]],
    describe: Callable[[], dict[str, Any]] = dict,
) -> bool:
    """Run all of it. Without a build nothing later would be about these sources; ``describe`` is
    asked again after it, for what was built."""
    if results.steps.run(build)[0].word != PASSED:
        results.steps.skip([step.name for steps in later for step in steps], "the build failed")
    else:
        results.environment |= describe()
        for steps in later:
            results.steps.run(*steps)
    return results.steps.passed


def run(kind: type[Results], plan: Callable[[Results], list[list[Step]]], suffix: str = "") -> int:
    """Build, run a plan into the file of this GPU and ``suffix``; the exit code."""
    sentence = missing()
    if sentence is not None:
        print(f"{kind.target}: no GPU to check: {sentence}.", file=sys.stderr)
        return NO_GPU
    environment = environment_of("cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = results_path(environment["device"], suffix)
        results = kind(path, environment, Path(folder) / "benchmark.json")
        passed = check(results, build_step(), plan(results), lambda: environment_of("cuda"))
    print(f"{kind.target}: {'passed' if passed else 'NOT passed'}; {path.relative_to(ROOT)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(run(Results, plan))
