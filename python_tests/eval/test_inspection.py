# SPDX-License-Identifier: Apache-2.0
"""The inspection of each token of a text, against the slow formula, and its page."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_models import make_model

from dualhead_ext import cli
from dualhead_ext.eval.inspection import Inspection, inspect_tokens, write_page


class Letters:
    """A tokenizer with one letter per token."""

    def decode(self, ids, **options):
        return "".join(chr(ord("a") + i % 26) if i % 5 else "</script><b>" for i in ids)


IDS = [5, 7, 11, 13, 17, 20]
CASES = [("llama", "logits", {}), ("gemma2-softcap", "logits", {"strength": 0.7})]
CASES += [("granite-scale", "probs", {"strength": 0.5}), ("phi-bias", "logits", {"alpha": 0.3})]
CASES += [("llama", "logits", {"max_kl": 0.02})]


@pytest.mark.parametrize(("family", "mix", "controls"), CASES)
def test_inspection_is_what_the_model_computes(family, mix, controls):
    model = make_model(family, mix=mix)
    found = inspect_tokens(model, Letters(), IDS, 2, 3, **controls)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        mixture, backbone, reward = (
            torch.log_softmax(model(input_ids=ids, **c).logits[0].double(), -1)
            for c in (controls, {"strength": 0.0}, {"alpha": 1.0})
        )
        model(input_ids=ids, **controls)
    alpha = model.lm_head_module.last_alpha[0]
    assert [token.token for token in found.tokens] == IDS[2:]
    for i, token in enumerate(found.tokens, start=1):  # position i predicts token i + 1
        p, q = mixture[i], backbone[i]
        assert token.alpha == pytest.approx(float(alpha[i]), abs=1e-5)
        assert token.kl == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        for head, shown, own in zip(
            (p, q, reward[i]),
            (token.mixture, token.lm_head, token.reward_head),
            token.probability,
            strict=True,
        ):
            best = head.exp().topk(3)
            texts = [Letters().decode([t]) for t in best.indices.tolist()]
            assert [choice.text for choice in shown] == texts
            shares = [choice.probability for choice in shown]
            assert shares == pytest.approx(best.values.tolist(), abs=1e-5)
            assert own == pytest.approx(float(head[IDS[i + 1]].exp()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"start": 0}, ValueError, r"start must be in 1\.\.6, got 0"),
        ({"top": 0}, ValueError, r"top must be in 1\.\.101, got 0"),
        ({"colour": 1}, TypeError, "unknown controls colour"),
        ({"strength": -1.0}, ValueError, "strength"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        inspect_tokens(make_model("llama"), Letters(), IDS, **options)


class Page(HTMLParser):
    """A page's tokens, their tooltips, its data, and everything that would load a resource."""

    def __init__(self, text):
        super().__init__()
        self.spans, self.loads, self.tags, self.data = [], [], [], ""
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loads += [v for n, v in attrs.items() if n in ("src", "href", "srcset", "action")]
        self._inside = attrs.get("type") if tag == "script" else None
        if "data-i" in attrs:
            self.spans.append(attrs)

    def handle_data(self, text):
        if self._inside == "application/json":
            self.data += text


def test_the_page_stands_alone_and_no_text_leaves_its_place(tmp_path):
    model, path = make_model("llama"), tmp_path / "page.html"
    runs = [
        inspect_tokens(model, Letters(), IDS, label=f"strength {s:g}", strength=s)
        for s in (0.0, 1.0)
    ]
    write_page(path, runs, "<b>title</b>")
    text = path.read_text()
    shown = Page(text)
    assert not shown.loads and not re.search(r"https?://|@import|url\(", text)
    assert "b" not in shown.tags and shown.tags.count("script") == 2
    assert shown.tags.count("input") == 1, "a slider over two runs"
    data = json.loads(shown.data)
    assert [run["label"] for run in data] == ["strength 0", "strength 1"]
    assert len(shown.spans) == 2 * (len(IDS) - 1)
    colors = [re.search("background:(#[0-9a-f]{6})", span["style"])[1] for span in shown.spans]
    assert set(colors[: len(IDS) - 1]) == {"#5f87ff"}, "one scale for both runs, 0 its lower end"
    assert len(set(colors)) > 1
    first = runs[0].tokens[0]
    assert f"KL {first.kl:.4f}" in shown.spans[0]["title"]
    assert "LM head: " in shown.spans[0]["title"] and "reward head: " in shown.spans[0]["title"]
    assert data[1]["tokens"][4]["text"] == "</script><b>"
    notebook = Page(runs[1]._repr_html_())
    assert "script" not in notebook.tags and len(notebook.spans) == len(IDS) - 1
    assert "no token" in Inspection(())._repr_html_()


def test_inspect_and_generate_write_pages(tmp_path, capsys, monkeypatch):
    import dualhead_ext as dh

    heads, page = str(tmp_path / "heads"), str(tmp_path / "page.html")
    dh.DualHeadForCausalLM.from_backbone("embedded", gate="fixed", trial=False).save_pretrained(
        heads
    )
    said = ["inspect", heads, "--text", " Add some flour."]
    assert cli.main([*said, "--prompt", "How do I bake bread?"]) == 0
    out = capsys.readouterr().out
    assert re.sub(r"\{0.50\}", "", out).startswith(" Add some flour.\n")
    assert "alpha: 0.50 at each" in out and "KL from the backbone: 0.0000" in out
    assert cli.main([*said, "--html", page, "--strengths", "0,1"]) == 0
    assert f"page of 2 texts in {page}" in capsys.readouterr().out
    hello = ["generate", heads, "How do I bake bread?", "--max-new-tokens", "4"]
    assert cli.main([*hello, "--html", page, "--strengths", "0,1,2"]) == 0
    assert "page of 3 texts" in capsys.readouterr().out
    data = json.loads(Page((tmp_path / "page.html").read_text()).data)
    assert [run["label"] for run in data] == ["strength 0", "strength 1", "strength 2"]
    assert all(run["tokens"] for run in data)
    for argv, words in (
        ([*hello, "--strengths", "1"], "--strengths: expected only with --html"),
        ([*hello, "--html", str(tmp_path)], "--html: expected a file that can be written"),
        ([*hello, "--html", page, "--strengths", "-1"], "--strengths: expected numbers of at le"),
        (["inspect", heads, "--text", ""], "--text: expected some text"),
    ):
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err
