# SPDX-License-Identifier: Apache-2.0
"""Scorers: each ranks a text that has its property above one that has not.

An input that a scorer cannot use gives one sentence.
"""

import builtins
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.eval import scorers
from dualhead_ext.eval.scorers import SCORERS, scorer

PROPERTY = {
    "vader": ("What a wonderful, happy day!", "A terrible and sad day."),
    "afinn": ("What a wonderful, happy day!", "A terrible and sad day."),
    "textblob": ("What a wonderful, happy day!", "A terrible and sad day."),
    "ari": (
        "The cat sat on a mat.",
        "Notwithstanding, epistemological considerations predominate.",
    ),
    "coleman-liau": ("The cat sat on a mat.", "Notwithstanding considerations predominate daily."),
    "lix": (
        "The cat sat on a mat.",
        "Notwithstanding, epistemological considerations predominate.",
    ),
    "characters": ("Yes.", "Yes, of course, I think so too."),
    "words": ("Yes.", "Yes, of course, I think so too."),
    "alt-profanity-check": ("Have a nice day.", "You are a stupid idiot."),
    "better-profanity": ("Have a nice day.", "This is bullshit."),
}


@pytest.mark.parametrize("name", SCORERS)
def test_the_better_text_gets_the_higher_reward(name):
    better, worse = PROPERTY[name]
    found = scorer(name)
    high, low = found.rewards("A question", [better, worse])
    assert high > low
    measured = found.measure("A question", [better, worse])
    assert (measured[0] > measured[1]) == found.higher_is_better
    # A text's value does not depend on the texts beside it.
    assert found.measure("A question", [worse]) == [measured[1]]


@pytest.mark.parametrize("name", SCORERS)
def test_odd_texts_have_finite_scores(name):
    assert len(scorer(name).rewards("", ["", "!!!", "word", "\N{GRINNING FACE}"])) == 4


def test_afinn_does_not_reward_length():
    once, twice = scorer("afinn").measure("", ["good news", "good news good news"])
    assert once == twice > 0


def test_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "rules_of_mine.py").write_text(
        "def longer(prompt, response):\n    return len(response) - len(prompt)\n\nnumber = 3\n"
        "def broken(prompt, response):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert scorer("rules_of_mine:longer").rewards("abc", ["a", "abcde"]) == [-2.0, 2.0]
    with pytest.raises(ValueError, match="expected 1 finite numbers"):
        scorer("rules_of_mine:broken").rewards("abc", ["a"])
    for name, message in (
        ("rules_of_mine:absent", "module rules_of_mine has no absent"),
        ("rules_of_mine:number", "must be a function, got 3"),
        ("no_such_rules:longer", "there is no module no_such_rules"),
        ("vadar", "expected one of vader"),
        ("judge:name", "needs the URL"),
        ("reward-model:nowhere", "there is no folder nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer(name)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("afinn"):
            raise ModuleNotFoundError("No module named 'afinn'", name="afinn")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    scorers._loaded.cache_clear()
    with pytest.raises(ImportError, match=r"package afinn.*dualhead_ext\[steering\]"):
        scorer("afinn")


def test_a_reward_model(tmp_path):
    path = dh.data.embedded_backbone_path()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    model.config.pad_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(path)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    prompt, texts = "How are you?", ["Fine.", "I would rather not say that."]
    rewards = scorer(f"reward-model:{tmp_path}").rewards(prompt, texts)
    for text, reward in zip(texts, rewards, strict=True):
        with torch.no_grad():
            slow = model.eval()(**tokenizer(prompt, text, return_tensors="pt")).logits
        assert reward == pytest.approx(float(slow))


class _Judge(BaseHTTPRequestHandler):
    """Prefers the longer answer."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first = text.split("[Answer 1]\n")[1].split("\n\n[Answer 2]")[0]
        second = text.split("[Answer 2]\n")[1].split("\n\nReply")[0]
        verdict = "tie" if len(first) == len(second) else str(1 + (len(second) > len(first)))
        answer = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


def test_a_judge_scores_by_the_share_of_wins():
    server = HTTPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = scorer("judge:any", f"http://127.0.0.1:{server.server_port}/v1")
        assert found.rewards("Why?", ["aa", "bbbb", "cc"]) == [0.25, 1.0, 0.25]
        assert found.compares
    finally:
        server.shutdown()
        server.server_close()
