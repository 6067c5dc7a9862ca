# SPDX-License-Identifier: Apache-2.0
"""The scripts in examples/ run on the built-in model, and do what they describe."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import dualhead_ext as dh
from dualhead_ext.head.gate import GATES, Gate, register_gate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(capsys: pytest.CaptureFixture, name: str, *arguments: str) -> tuple[str, dict]:
    """What the script prints, and its global names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out, names


def test_every_script_is_tested_and_described():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    page, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(name in page and name in here for name in scripts)


@pytest.mark.slow
def test_train_then_a_strength_per_request(tmp_path, capsys):
    heads = str(tmp_path / "heads")
    out, _ = run(capsys, "train_on_jsonl.py", "--output", heads)
    assert "24 pairs" in out and re.search(r"accuracy on 3 held-out pairs: \d\.\d\d before", out)

    out, _ = run(capsys, "strength_per_request.py", heads, "--max-new-tokens", "8")
    alphas = [float(value) for value in re.findall(r"mean alpha (\S+):", out)]
    assert alphas[0] == 0 and alphas == sorted(alphas) and alphas[-1] > alphas[1]


def test_two_objectives(tmp_path, capsys):
    folder = tmp_path / "two"
    out, _ = run(capsys, "two_objectives.py", "--output", str(folder))
    texts = re.findall(r"lively \S+: (.*)", out)
    assert len(texts) == 3 and texts[2].count("!") > texts[0].count("!")
    assert dh.DualHeadForCausalLM.from_pretrained(folder).dual_head_config.num_objectives == 2


@pytest.fixture
def gates():
    """The registered gates, which are restored after the test."""
    from dualhead_ext import config

    before = dict(GATES), list(config.GATE_NAMES)
    yield GATES
    GATES.clear(), GATES.update(before[0])
    config.GATE_NAMES[:] = before[1]


@pytest.mark.slow
def test_a_gate_of_ones_own(tmp_path, capsys, gates):
    folder = tmp_path / "own"
    out, _ = run(capsys, "own_gate.py", "--output", str(folder), "--max-new-tokens", "8")
    assert "by NetworkGate" in out
    low, high = map(float, re.search(r"alpha from (\S+) to (\S+),", out).groups())
    assert 0 < low < high < 1
    assert dh.DualHeadForCausalLM.from_pretrained(folder).dual_head_config.gate == "network"
    del gates["network"]


def test_registering_refuses(gates):
    with pytest.raises(
        TypeError, match="gate must be a class derived from Gate, got <class 'int'>"
    ):
        register_gate("mine", int)
    with pytest.raises(ValueError, match="name must be new, got 'linear'"):
        register_gate("linear", type("Mine", (Gate,), {}))
    assert "mine" not in gates
    register_gate("linear", gates["linear"])  # registering the same class again changes nothing
    with pytest.raises(ValueError, match="gate must be one of attention, fixed, linear, got"):
        dh.DualHeadConfig(hidden_size=8, vocab_size=8, gate="network")
