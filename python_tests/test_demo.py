# SPDX-License-Identifier: Apache-2.0
"""The demo at its smallest: what it prints is what it measured, and what it leaves works."""

import re

import pytest
import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.eval.metrics import longer_is_better, wilson_interval

PAIRS, TESTS, NEW = 16, 12, 6
ACCURACY = r"([\d.]+) % of (\d+) pairs \(95 % interval ([\d.]+) to ([\d.]+) %\)"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, what was printed)"""
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
        sizes = {"--epochs": 6, "--train-pairs": PAIRS, "--test-pairs": TESTS, "--new-tokens": NEW}
        options = [text for pair in sizes.items() for text in map(str, pair)]
        code = cli.main(["demo", "--output", str(folder), "--color", "never", *options])
    assert code == 0
    return folder, "".join(printed)


def held_out():
    return dh.data.load_preference_data("embedded", "test")[:TESTS]


@torch.no_grad()
def slow_accuracy(model, tokenizer):
    """Pair by pair, without padding: sum of log softmax(z_RM) over the response."""
    right = 0
    for row in held_out():
        sums = []
        for name in ("chosen", "rejected"):
            prompt, text = row["prompt"], row["prompt"] + row[name]
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
            start = tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1]
            logits = model(input_ids=ids, alpha=1.0).logits.log_softmax(-1)
            each = logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(each[start - 1 :].sum())
        right += bool(sums[0] > sums[1])
    return right


def test_accuracies_before_and_after(demo):
    folder, out = demo
    before, after = re.findall(ACCURACY, out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = str(dh.data.embedded_backbone_path())
    models = (
        dh.DualHeadForCausalLM.from_backbone(path, dtype=torch.float32),
        dh.DualHeadForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    for shown, model in zip((before, after), models, strict=True):
        right = slow_accuracy(model, tokenizer)
        low, high = wilson_interval(right, TESTS)
        expected = (right / TESTS, low, high)
        assert [f"{100 * x:.1f}" for x in expected] == [shown[0], *shown[2:]]
        assert int(shown[1]) == TESTS


def test_the_baseline_stands_beside(demo):
    longer, _ = longer_is_better(held_out())
    assert f"always the longer one   {100 * longer:.1f} %" in demo[1]


def test_every_decoder_answers_each_question(demo):
    _, out = demo
    lines = [line for line in out.splitlines() if re.match(r" *(backbone|gated|reward): ", line)]
    names = [line.split(":")[0].strip() for line in lines]
    assert names == ["backbone", "gated", "reward"] * (len(lines) // 3) and len(lines) >= 9
    for name, line in zip(names, lines, strict=True):
        alphas = [float(a) for a in re.findall(r"\{(\d\.\d\d)\}", line)]
        if name == "backbone":
            assert not alphas
        else:
            assert alphas and all(0 <= a <= 1 for a in alphas)
        if name == "reward":
            assert set(alphas) == {1.0}


def test_what_it_leaves_decodes(demo, capsys):
    folder, out = demo
    assert f"dualhead generate {folder}" in out
    argv = ["generate", str(folder), "Hello?", "--max-new-tokens", "4"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.strip()
