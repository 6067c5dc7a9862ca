# SPDX-License-Identifier: Apache-2.0
"""The package works without the folder of the benchmarks, and without that of the paper's
comparison.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dualhead_ext"
# Imports every other module. Then a head decodes, a backbone generates, and the commands run.
PROGRAM = """
import contextlib, importlib, io, pkgutil, sys
import dualhead_ext as dh
import torch

# vLLM and lm-eval are in environments of their own.
behind = (*sys.argv[1:], "eval.lm_harness", "vllm.")
for module in pkgutil.walk_packages(dh.__path__, "dualhead_ext."):
    name = module.name.removeprefix("dualhead_ext.")
    if not name.startswith(behind) and not name.endswith("__main__") and not name.startswith("_C"):
        importlib.import_module(module.name)

head = dh.DualHead(dh.DualHeadConfig(hidden_size=8, vocab_size=11, gate_num_heads=2))
print(head.step(torch.ones(1, 8), head.new_cache(1, 4)).token.shape)
model = dh.DualHeadForCausalLM.from_backbone(dh.data.embedded_backbone_path())
print(model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, min_new_tokens=2).shape)

from dualhead_ext.cli import main
for command in ([], ["sample"], ["train"], ["generate"], ["eval"], ["bench"], ["info"]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert said.getvalue().startswith("usage: "), command
"""


@pytest.mark.parametrize(
    ("folder", "behind"),
    [
        pytest.param("bench", ["bench"], marks=pytest.mark.slow),
        # `dualhead eval --suite` runs eval/paper, and the steering suite uses its way to store
        # cells.
        ("eval/paper", ["eval.paper", "eval.steering", "cli.eval_suite", "cli.eval_steering"]),
    ],
)
def test_the_package_works_without(folder, behind, tmp_path):
    copy = tmp_path / "dualhead_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / folder)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *behind],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:2] == ["torch.Size([1])", "torch.Size([1, 4])"]
