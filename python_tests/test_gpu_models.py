# SPDX-License-Identifier: Apache-2.0
"""`make gpu-models` without a GPU: its commands, its limits, and the file that its parts share."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import gpu_check
import gpu_models
from gpu_steps import FAILED, PASSED, ROOT, TIMED_OUT, Step, of_command

from dualhead_ext import bench
from dualhead_ext.bench import report
from dualhead_ext.cli import build_parser


def parts_in(folder) -> gpu_models.Parts:
    environment = {"device": "Made Up 9000", "driver": "1.2", "csrc_sha256": "0" * 64}
    return gpu_models.Parts(folder / "made-up-models.json", environment, folder / "benchmark.json")


def test_without_a_gpu_it_says_so_and_exits_with_3():
    done = subprocess.run(
        [sys.executable, "python_tests/gpu_models.py"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("gpu-models: no GPU to check: torch ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_the_commands_are_ones_that_dualhead_takes(tmp_path):
    results = parts_in(tmp_path)
    seen = []
    for part in gpu_models.LIMITS:
        command = gpu_models.command(results, part)
        assert command[:3] == [sys.executable, "-m", "dualhead_ext.cli"]
        arguments = build_parser().parse_args(command[3:])
        assert (arguments.command, arguments.device, arguments.quick) == ("bench", "cuda", False)
        bench.check_options(arguments.seconds, arguments.json)
        seen += arguments.part
    assert sorted(seen) == ["loss", "models", "training"] and set(seen) < set(bench.PARTS)


def test_the_limits_fit_into_ten_minutes(tmp_path):
    steps = [step for together in gpu_models.plan(parts_in(tmp_path)) for step in together]
    assert [step.name for step in steps] == list(gpu_models.LIMITS)
    assert gpu_models.Parts.seconds < 600
    assert gpu_check.results_path("NVIDIA H200", "-models").name == "nvidia-h200-models.json"


def test_the_file_has_what_each_part_measured(tmp_path):
    """Also of a part that failed, and of one whose time ran out; the rest of the file is one."""
    results = parts_in(tmp_path)
    rows = {
        "training": {"training": [{"contender": "forward"}], "failures": ["slow"], "quick": False},
        "models": {"generate": [{"contender": "backbone"}], "failures": [], "quick": False},
        "loss": {"loss": [{"contender": "dualhead"}], "failures": ["slower"], "quick": False},
    }
    ends = {"training": "raise SystemExit(1)", "models": "", "loss": "import time; time.sleep(60)"}
    later = []
    for part, limit in (("training", 30.0), ("models", 30.0), ("loss", 3.0)):
        text = json.dumps({"cases": [], "device": "of the benchmark"} | rows[part])
        write = f"open({str(results.file_of(part))!r}, 'w').write({text!r})\n{ends[part]}"
        later.append([Step(part, limit, of_command([sys.executable, "-c", write]))])
    build = Step("build", 30.0, of_command([sys.executable, "-c", ""]))
    assert not gpu_check.check(results, build, later)
    found = report.load(results.path)
    assert found["training"] and found["generate"] and found["loss"] and found["cases"] == []
    assert found["failures"] == ["slow", "slower"] and found["quick"] is False
    assert found["device"] == "Made Up 9000" and "tests" not in found
    outcomes = {step["name"]: step["outcome"] for step in found["steps"]}
    assert outcomes == {"build": PASSED, "training": FAILED, "models": PASSED, "loss": TIMED_OUT}
