# SPDX-License-Identifier: Apache-2.0
"""``dualhead eval HEADS``: the command, and its figures against slow versions of them."""

import html
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from legible import check_legible
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.eval import likelihood, sampling
from dualhead_ext.eval.heads.pairs import pair_figures
from dualhead_ext.eval.heads.plot import sweep_figure
from dualhead_ext.eval.heads.report import _cell, finding, to_markdown
from dualhead_ext.eval.heads.sweep import sample_replies, sweep_figures
from dualhead_ext.eval.metrics import longer_is_better
from dualhead_ext.eval.scorers import scorer
from dualhead_ext.eval.text import mean_length

QUESTIONS = ["How do I bake bread?", "What is a gate?", "Tell me a joke."]
RULE = "def vowels(prompt, response):\n    return sum(c in 'aeiou' for c in response)\n"


def run(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return stop.code


def make_heads(**config):
    """An untrained gated model whose heads have an effect."""
    torch.manual_seed(0)
    model = dh.DualHeadForCausalLM.from_backbone(
        dh.backbone_path("embedded"), dtype=torch.float32, **config
    )
    head = model.lm_head_module
    for part in (head.reward_head, head.gate):
        for parameter in part.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dh.backbone_path("embedded"))


@pytest.fixture(scope="module")
def model():
    return make_heads(gate="attention", reward_head="embedding", preference="token_reward")


@pytest.fixture(scope="module")
def pairs():
    return dh.data.load_preference_data("embedded", "test")[:5]


@pytest.fixture
def place(tmp_path, monkeypatch, model, pairs):
    model.save_pretrained(tmp_path / "heads")
    rows = [json.dumps(dict(row)) for row in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n")
    (tmp_path / "rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVAL = ["eval", "heads", "--data", "pairs.jsonl", "--max-length", "96", "--max-new-tokens", "8"]


def test_eval_writes_json_a_page_and_a_picture(place, capsys, model, tokenizer, pairs):
    argv = [*EVAL, "--prompts", "questions.txt", "--strengths", "1,2", "--scorer", "rule:vowels"]
    assert run(*argv, "--out", "report") == 0
    printed = capsys.readouterr().out
    report = json.loads((place / "report" / "eval.json").read_text())
    assert [row["strength"] for row in report["sweep"]] == [0, 1, 2]
    assert report["pairs"]["pairs"] == len(pairs) and report["prompts"] == len(QUESTIONS)
    assert [row["prompt"] for row in report["replies"]] == QUESTIONS
    for i, row in enumerate(report["sweep"]):
        texts = [found["replies"][i] for found in report["replies"]]
        counts = [sum(c in "aeiou" for c in text) for text in texts]
        assert row["scores"]["rule:vowels"][0] == pytest.approx(sum(counts) / len(counts))
        assert row["words"][0] == pytest.approx(mean_length(texts))
        for value, low, high in (row["kl"], row["perplexity"], row["words"]):
            assert low <= value <= high
    assert report["sweep"][0]["kl"][0] == 0.0 < report["sweep"][1]["kl"][0]
    assert report["environment"]["torch"] == torch.__version__

    page = (place / "report" / "eval.md").read_text()
    for word in ("## Pairs", "## Strengths", "## Replies side by side", "0 (backbone)", *QUESTIONS):
        assert word in page
    assert "![The sweep over strengths](sweep.png)" in page
    assert (place / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    check_legible(sweep_figure(report))
    for name in ("eval.json", "eval.md", "sweep.png"):
        assert f"report/{name}" in printed
    assert "accuracy on 5 pairs" in printed and "the longer one" in printed

    assert run(*argv, "--out", "again", "--no-plot") == 0
    again = json.loads((place / "again" / "eval.json").read_text())
    assert again["sweep"] == report["sweep"] and again["replies"] == report["replies"]
    assert not (place / "again" / "sweep.png").exists()
    assert "sweep.png" not in (place / "again" / "eval.md").read_text()


@pytest.mark.parametrize("reward_head", ["full", "embedding"])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_accuracies_are_those_of_likelihood(reward_head, mix, tokenizer, pairs):
    preference = "log_prob" if reward_head == "full" else "token_reward"
    model = make_heads(gate="linear", reward_head=reward_head, mix=mix, preference=preference)
    found = pair_figures(model, tokenizer, pairs, 96, 3)["accuracy"]
    slow = {
        "mixture": likelihood.of_model(model, strength=1.0),
        "backbone": likelihood.of_model(model, strength=0.0),
    }
    if reward_head == "full":
        slow["reward head"] = likelihood.of_reward_head(model)
    for name, system in slow.items():
        accuracy = likelihood.pair_accuracy(system, pairs, tokenizer, 96).accuracy
        assert found[name] == pytest.approx(list(accuracy)), name
    assert found["the longer one"][0] == longer_is_better(pairs)[0]
    if reward_head == "embedding":
        assert found["reward head"][0] == pytest.approx(
            token_reward_accuracy(model, tokenizer, pairs)
        )


def token_reward_accuracy(model, tokenizer, pairs):
    """Ranks by the sum of alpha * delta over the response, one text at a time."""
    head, wins = model.lm_head_module, 0.0
    for row in pairs:
        sums = []
        for side in ("chosen", "rejected"):
            (text,) = likelihood.make_texts([(row["prompt"], row[side])], tokenizer, 96)
            ids = torch.tensor([text.ids])
            with torch.no_grad():
                hidden = model.training_hidden_states(input_ids=ids)[0, :-1]
                alpha = torch.sigmoid(head.gate(hidden[None])[0])
                delta = head.reward_head.token_rewards(hidden, ids[0, 1:], head.lm_weight)[0]
            sums.append(float((alpha * delta * torch.tensor(text.response[1:])).sum()))
        wins += sums[0] > sums[1]
    return wins / len(pairs)


def test_ranked_lists_are_pairs_within_their_rows(model, tokenizer):
    texts = [" Good.", " It is a door in a fence.", " I do not know that."]
    scored = ([3.0, 1.0, 2.0], [0.0, 1.0, 1.0], [1.0, 2.0, 0.0])
    rows = [
        {"prompt": f"\n\nHuman: {question}\n\nAssistant:", "responses": texts, "scores": scores}
        for question, scores in zip(QUESTIONS, scored, strict=True)
    ]
    found = pair_figures(model, tokenizer, rows)
    assert (found["rows"], found["pairs"]) == (3, 3 + 2 + 3)
    assert found["interval"] == "bootstrap over rows"
    assert found["accuracy"]["the longer one"][0] == longer_is_better(rows)[0]
    flat = [
        {"prompt": row["prompt"], "chosen": texts[a], "rejected": texts[b]}
        for row in rows
        for a, b in dh.data.score_pairs(row["scores"])
    ]
    apart = pair_figures(model, tokenizer, flat)["accuracy"]
    for name, (value, *_) in found["accuracy"].items():
        assert value == pytest.approx(apart[name][0])


def test_the_sweep_is_what_the_model_gives_its_own_text(model, tokenizer):
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    strengths = [0.0, 1.0, 3.0]
    replies = sample_replies(model, tokenizer, prompts, strengths, 10, seed=3, batch_size=4)
    rows = sweep_figures(model, prompts, strengths, replies, [scorer("characters")], batch_size=2)
    for i, (strength, row) in enumerate(zip(strengths, rows, strict=True)):
        texts = [found[i].tokens for found in replies]
        system = likelihood.of_model(model, strength=strength)
        base = likelihood.of_model(model, strength=0.0)
        kl = likelihood.token_mean(likelihood.token_kl(system, base, texts))
        assert row["kl"] == pytest.approx(list(kl), rel=1e-4, abs=1e-6)
        perplexity = likelihood.perplexity(likelihood.token_log_probs(base, texts))
        assert row["perplexity"] == pytest.approx(list(perplexity), rel=1e-4)
        assert row["alpha"]["min"] <= row["alpha"]["mean"] <= row["alpha"]["max"]
        assert (row["alpha"]["max"] > 0) == (strength > 0)
        scores = [len(found[i].text) for found in replies]
        assert row["scores"]["characters"][0] == pytest.approx(sum(scores) / 3)
    assert rows[0]["gains"]["characters"] == [0.0, 0.0, 0.0]
    # At strength 0 the text is a sample of the backbone with the same seed.
    backbone = AutoModelForCausalLM.from_pretrained(
        dh.backbone_path("embedded"), dtype=torch.float32
    )
    plain = sampling.sample(backbone, tokenizer, prompts, [0], 10, seed=3)
    assert [row[0].text for row in replies] == [found[0].text for found in plain]


def test_two_objectives_and_two_scorers(place, capsys, tokenizer):
    """Each objective has a reward head.

    One scorer is built in, one is the user's. Bars are shown.
    """
    model = make_heads(
        gate="linear", reward_head="embedding", preference="token_reward", num_objectives=2
    )
    model.save_pretrained(place / "two")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    rows = [row | {"objective": i % 2} for i, row in enumerate(rows)]
    (place / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["eval", "two", "--data", "two.jsonl", *EVAL[4:], "--prompts", "questions.txt"]
    argv += ["--strengths", "1", "--scorer", "words", "--scorer", "rule:vowels", "--no-plot"]
    reports = []
    for weights, out in (("1,0", "first"), ("0,1", "second")):
        assert run(*argv, "--objective-weights", weights, "--out", out) == 0
        reports.append(json.loads((place / out / "eval.json").read_text()))
        err = capsys.readouterr().err
        for bar in ("ranking responses: 100%", "replying to prompts: 100%", "measuring replies"):
            assert bar in err
    first, second = reports
    assert first["scorers"] == ["words", "rule:vowels"]
    # Each pair is ranked by the head of its own objective, whatever steers the replies.
    assert first["pairs"] == second["pairs"]
    expected = pair_figures(model, tokenizer, rows, 96)["accuracy"]
    apart = [pair_figures(model, tokenizer, [row], 96)["accuracy"] for row in rows]
    for name, (value, *_) in expected.items():
        assert value == pytest.approx(sum(one[name][0] for one in apart) / len(rows))
        assert first["pairs"]["accuracy"][name][0] == pytest.approx(value)
    # The weights of the objectives matter only if the heads are used.
    assert first["sweep"][0]["kl"] == second["sweep"][0]["kl"] == [0.0, 0.0, 0.0]
    assert first["sweep"][1]["kl"] != second["sweep"][1]["kl"]
    for report in reports:
        for i, row in enumerate(report["sweep"]):
            texts = [found["replies"][i] for found in report["replies"]]
            assert row["scores"]["words"][0] == pytest.approx(mean_length(texts))
            vowels = [sum(c in "aeiou" for c in text) for text in texts]
            assert row["scores"]["rule:vowels"][0] == pytest.approx(sum(vowels) / len(vowels))
    page = (place / "first" / "eval.md").read_text()
    assert "words" in page and "rule:vowels (more is better)" in page


def test_a_models_text_is_no_markup(model, tokenizer, place):
    assert run(*EVAL, "--limit", "2", "--strengths", "1", "--no-plot", "--out", "report") == 0
    report = json.loads((place / "report" / "eval.json").read_text())
    report["replies"][0]["replies"] = ["a | b\n<img src=x>", "![x](y)"]
    page = to_markdown(report)
    (line,) = [line for line in page.splitlines() if "img src" in line]
    assert line.count("|") == 4 and "&lt;img" in line and "![x](y)" not in line


def test_what_stands_in_a_cell_reads_as_the_model_wrote_it():
    text = '# a * b_c `d` [e](f) ~~g~~ | &amp; <b> \\ "h"\n* i #1'
    cell = _cell(text)
    assert not set("*_`[]~|\\") & set(cell.replace("<br>", ""))
    assert html.unescape(cell.replace("<br>", "\n")) == text


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["eval", "none", "--data", "pairs.jsonl"], "heads: expected a folder written by train"),
        (
            ["eval", "heads"],
            "dualhead eval: expected --data, --prompts or both with HEADS, got neither",
        ),
        (["eval", "heads", "--data", "none.jsonl"], "--data:"),
        ([*EVAL, "--prompts", "none.txt"], "--prompts:"),
        ([*EVAL, "--scorer", "nobody"], "--scorer: scorer: expected one of"),
        ([*EVAL, "--scorer", "judge:m"], "needs the URL of its endpoint"),
        ([*EVAL, "--strengths", "-1"], "--strengths: expected numbers of at least 0, got -1"),
        ([*EVAL, "--backbone", "./none"], "--backbone: expected a folder"),
        ([*EVAL, "--out", "rule.py"], "--out: expected a folder, got rule.py"),
        ([*EVAL, "--suite", "paper"], "--suite: expected HEADS or --suite, got heads and --suite"),
        ([*EVAL, "--seeds", "2"], "--seeds: expected only with --suite paper or --suite steering"),
        (["eval", "--suite", "steering", "--prompts", "questions.txt"], "expected only with HEADS"),
        (
            ["eval", "--suite", "paper", "--scale", "tiny", "--limit", "2"],
            "expected only with HEADS",
        ),
    ],
)
def test_mistakes_are_one_sentence_before_anything_heavy(argv, words, place):
    if "--out" not in argv:
        argv = [*argv, "--out", "report"]
    code = (
        "import sys; from dualhead_ext import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules or 'transformers' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (place / "report").exists()


def test_mistakes_that_only_the_heads_know(place, capsys):
    long = "word " * 1100
    (place / "long.txt").write_text(long)
    for argv, words in (
        (["--objective-weights", "1,2"], "have objectives, 1, got 2"),
        (["--prompts", "long.txt"], "--prompts: expected prompts that leave room for 8 tokens"),
        (["--device", "cuda:99"], "--device: expected a device"),
    ):
        assert run(*EVAL, *argv, "--out", "report") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert not (place / "report").exists()


def test_a_scorer_that_fails_is_one_sentence(place, capsys):
    (place / "rule_that_fails.py").write_text(
        "def fails(prompt, response):\n    return 1 / 0\n"
        "def nan(prompt, response):\n    return float('nan')\n"
    )
    for name, words in (
        ("fails", "--scorer: scorer rule_that_fails:fails: ZeroDivisionError: division by zero"),
        ("nan", "--scorer: scorer rule_that_fails:nan: expected 2 finite numbers"),
    ):
        argv = ["--limit", "1", "--strengths", "1", "--scorer", f"rule_that_fails:{name}"]
        assert run(*EVAL, *argv, "--out", "report") == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "report").exists()


def test_without_matplotlib_it_says_how_to_go_on(place, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else there(name, *a),
    )
    assert run(*EVAL, "--out", "report") == 2
    error = capsys.readouterr().err
    assert "dualhead_ext[plot]" in error and "--no-plot" in error and error.count("\n") == 1
    assert not (place / "report").exists()


@pytest.mark.parametrize(("low", "clear"), [(-0.003, False), (0.003, True)])
def test_the_first_sentence_claims_no_change_that_may_be_none(low, clear):
    first = {"strength": 0, "scores": {"v": [0.4, 0.2, 0.6]}, "kl": [0, 0, 0]}
    last = first | {"strength": 2.0, "gains": {"v": [0.05, low, 0.1]}}
    sweep = [at | {"perplexity": [15.0, 9.0, 20.0]} for at in (first, last)]
    sentence = finding({"sweep": sweep})
    assert ("the interval of the change holds 0" in sentence) == (not clear)
