# SPDX-License-Identifier: Apache-2.0
"""The benchmark of rewards on human preference pairs, with the embedded backbone."""

import gzip
import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import embedded_backbone_path

ROOT = Path(__file__).resolve().parents[2]
GOOD, BAD = ("good", "kind", "happy", "nice"), ("bad", "cruel", "sad", "mean")
THINGS = ("dog", "house", "friend", "garden", "song", "letter", "road", "lamp")


@pytest.fixture(scope="module")
def hh():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("hh_pairs")
    for name in ("hh_pairs", "hh_states"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs in HH-RLHF's layout: the chosen responses speak well of things, of both subsets."""
    folder = tmp_path_factory.mktemp("hh-rlhf")
    made = itertools.product(THINGS, range(4), ("helpful-base", "harmless-base"))
    rows = []
    for thing, number, subset in made:
        prompt = f"\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: A {thing}?\n\nAssistant:"
        texts = [f"{prompt} The {thing} is {words[number]}." for words in (GOOD, BAD)]
        rows.append({"chosen": texts[0], "rejected": texts[1] + "....", "subset": subset})
    for split, part in (("train", rows[:48]), ("test", rows[48:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_backbone_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def splits(hh, data, model):
    """Both splits, with their states in float32."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    found = {}
    for split in ("train", "test"):
        pairs = found[split] = hh.read_pairs(data / f"{split}.jsonl.gz", tokenizer, 512)
        for pair in pairs:
            (pair.states,) = hh.states_of(model.get_decoder(), [pair])
    return found


@torch.no_grad()
def test_states_are_those_of_each_text_alone(hh, splits, model):
    pairs = splits["test"][:3]
    pairs[1].prompt = pairs[1].prompt[5:]  # texts of several lengths
    for pair, both in zip(pairs, hh.states_of(model.get_decoder(), pairs), strict=True):
        for ids, states in zip(pair.responses, both, strict=True):
            text = torch.tensor([pair.prompt + ids])
            alone = model.get_decoder()(text).last_hidden_state[0, len(pair.prompt) - 1 :]
            torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)
            log_probs = model(text).logits[0, :-1].log_softmax(-1)[len(pair.prompt) - 1 :]
            expected = log_probs.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            got = hh.log_probs_of(model.lm_head.weight, ids, states)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_long_prompt_loses_its_beginning_and_no_response(hh, data, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    whole = hh.read_pairs(data / "test.jsonl.gz", tokenizer, 512)[0]
    longest = max(map(len, whole.responses))
    monkeypatch.setattr("hh_states.PROMPT", 3)
    for room, kept in ((longest + 5, 5), (4, 3)):
        cut = hh.read_pairs(data / "test.jsonl.gz", tokenizer, room)[0]
        assert cut.responses == whole.responses and cut.spoken == whole.spoken
        assert cut.prompt == whole.prompt[-kept:]


@pytest.mark.parametrize(
    "reward",
    [
        "token rewards (default)",
        "two heads",
        "value of the state, mean",
        "value of the state, mean, pairs weighted",
        "two values, mean",
        "value folded into token rewards, rank 64",
    ],
)
def test_a_reward_learns_a_planted_preference(hh, splits, model, reward):
    gated = dh.DualHeadForCausalLM.from_backbone(model, trial=False)
    job = hh.job_of(gated, splits, seed=0)
    try:
        right = hh.wins_of(hh.REWARDS[reward](job), splits["test"])
    finally:
        dh.detach(gated)
    assert right["all"] >= 15, right
    assert right["all"] == right["helpful-base"] + right["harmless-base"]


def test_wins_count_ties_half(hh, splits):
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    assert hh.wins_of(scores, splits["test"][:3])["all"] == 1.5


def test_the_command(hh, data, tmp_path, monkeypatch, capsys):
    """States, then fits; both stop when their time is over and continue."""
    names = ("the longer one", "mean log-probability", "value of the state, last")
    monkeypatch.setattr(hh, "REWARDS", {name: hh.REWARDS[name] for name in names})
    monkeypatch.setattr("hh_states.SHARD", 6)
    file, states = tmp_path / "found.json", str(tmp_path / "states")
    shared = ["--data", str(data), "--backbone", "embedded", "--pairs", "12"]
    with pytest.raises(SystemExit, match=r"test-000\.safetensors and later ones are missing"):
        hh.main(["states", states, *shared, "--minutes", "0"])
    hh.main(["states", states, *shared])
    assert len(list(Path(states).iterdir())) == 4
    fit = ["fit", states, str(file), *shared, "--seeds", "2"]
    with pytest.raises(SystemExit, match="the longer one, seed 0, and later ones are missing"):
        hh.main([*fit, "--minutes", "0"])
    hh.main(fit)
    results = json.loads(file.read_text())
    assert [(row["reward"], row["seed"]) for row in results["rows"]] == [
        ("the longer one", None), ("mean log-probability", None),
        ("value of the state, last", 0), ("value of the state, last", 1),
    ]  # fmt: skip
    assert results["rows"][0]["right"] == {"all": 0.0, "helpful-base": 0.0, "harmless-base": 0.0}
    capsys.readouterr()
    hh.main(fit)
    assert json.loads(file.read_text()) == results
    hh.main(["table", str(file)])
    printed = capsys.readouterr().out
    assert "| the longer one | 0.0 [0.0, 24.2] |" in printed
    file.write_text(json.dumps(results | {"max_length": 9}))
    with pytest.raises(SystemExit, match="its max_length is 9, this is 512"):
        hh.main(fit)
    monkeypatch.setattr(hh, "decode", lambda job, subset, tokenizer, prompts: subset)
    hh.main(["decode", states, str(file), *shared])
    assert json.loads(file.read_text())["decoded"] == ["helpful-base", "harmless-base"]


def test_decoded_text_is_at_the_kl(hh, splits, model):
    gated = dh.DualHeadForCausalLM.from_backbone(model, trial=False)
    tokenizer = AutoTokenizer.from_pretrained(embedded_backbone_path())
    try:
        found = hh.decode(hh.job_of(gated, splits, seed=0), "harmless-base", tokenizer, 8)
    finally:
        dh.detach(gated)
    assert found["backbone"]["kl"]["value"] == 0 and len(found["texts"]) == 8
    assert 0.03 < found["steered"]["kl"]["value"] < 0.3
    differ = [row["backbone"] != row["steered"] for row in found["texts"]]
    assert sum(differ) >= 4, found["texts"]


def test_the_documents_table_is_of_the_committed_results(hh):
    text = (ROOT / "docs" / "results.md").read_text()
    quoted = text.partition("<!-- hh-pairs -->\n")[2].partition("\n<!-- /hh-pairs -->")[0]
    results = json.loads((ROOT / "benchmarks" / "results" / "hh-pairs.json").read_text())
    assert quoted == hh.table(results)
