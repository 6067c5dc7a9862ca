# SPDX-License-Identifier: Apache-2.0
"""Ranked lists (several scored responses to one prompt): rows, tokens, batches, cached states."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import load_preference_data, score_pairs
from dualhead_ext.data.collate import PreferenceCollator, texts_of, tokenize_pairs
from dualhead_ext.train.hidden_cache import HiddenCollator, rows_identity, split_rows

ROW = {"prompt": "Q:", "responses": [" a", " bb", " ccc"], "scores": [0.5, 2, 0.5]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())


def test_ranked_rows_are_loaded(tmp_path):
    ask = [{"role": "user", "content": "Hi"}]
    said = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    rows = [ROW, {"prompt": ask, "responses": said, "scores": [1, 0], "objective": 1, "x": 2}]
    data = load_preference_data(write(tmp_path / "a.jsonl", rows))
    assert data[0] == {**ROW, "scores": [0.5, 2.0, 0.5]}
    assert data[1] == {k: v for k, v in rows[1].items() if k != "x"}
    assert str(data.report).endswith("2 ranked lists")


def test_rows_without_a_preference_are_skipped_and_said(tmp_path, caplog):
    rows = [
        ROW,
        {**ROW, "scores": [1, 1, 1.0]},
        {**ROW, "responses": [" a"], "scores": [1]},
        {**ROW, "responses": [" a", " ", " c"]},
        {**ROW, "responses": [], "scores": []},
    ]
    data = load_preference_data(write(tmp_path / "a.jsonl", rows))
    assert len(data) == data.report.kept == 1
    assert data.report.skipped == {
        "no two different scores": [2],
        "fewer than two responses": [3, 5],
        "empty response": [4],
    }
    assert "no two different scores; line 2" in caplog.text
    for row in rows[1:]:
        with pytest.raises(ValueError, match="no usable row"):
            load_preference_data(write(tmp_path / "b.jsonl", [row]))


PAIR = {"prompt": "Q:", "chosen": " a", "rejected": " b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, PAIR], "line 2: expected ranked lists, as line 1 is, got pairs"),
        ([PAIR, ROW], "line 2: expected pairs, as line 1 is, got ranked lists"),
        ([ROW | PAIR], "expected chosen and rejected, or responses and scores, got chosen, rej"),
        ([{**ROW, "scores": [1, 2]}], "got 3 responses and 2 scores"),
        ([{**ROW, "scores": [1, 2, float("nan")]}], "line 1: scores must be finite, got nan"),
        ([{**ROW, "scores": [1, 2, float("-inf")]}], "scores must be finite, got -inf"),
        ([{**ROW, "scores": [1, 2, 10**400]}], "scores must be finite, got inf"),
        ([{**ROW, "scores": [1, 2, "3"]}], "scores must be numbers, got '3'"),
        ([{**ROW, "scores": [1, 2, True]}], "scores must be numbers, got True"),
        ([{**ROW, "scores": [1, 2, None]}], "scores must be numbers, got None"),
        ([{**ROW, "scores": 3}], "scores must be a list, got int"),
        ([{**ROW, "responses": "abc"}], "responses must be a list, got str"),
        ([{**ROW, "responses": [" a", 1, " c"]}], "expected a string or a list of"),
        ([{**ROW, "prompt": [{"role": "user", "content": "x"}]}], "must all be strings or all"),
        ([{k: ROW[k] for k in ("responses", "scores")}], "expected columns prompt, responses and"),
        ([{k: ROW[k] for k in ("prompt", "responses")}], "got prompt, responses"),
    ],
)
def test_broken_rows_are_refused_by_line(rows, message, tmp_path):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message) as caught:
        load_preference_data(path)
    assert str(path) in str(caught.value)


def test_each_response_is_tokenised_as_a_side_of_a_pair_is(tokenizer):
    (coded,) = tokenize_pairs([ROW], tokenizer, 64)
    assert coded["scores"] == ROW["scores"] and coded["objective"] == 0
    for text, (ids, mask) in zip(ROW["responses"], texts_of(coded), strict=True):
        (pair,) = tokenize_pairs([{"prompt": "Q:", "chosen": text, "rejected": " z"}], tokenizer)
        assert (ids, mask) == texts_of(pair)[0]


def ranked(lengths, scores, objective=0):
    tokens = iter(range(1, 1000))
    texts = [[next(tokens) for _ in range(n)] for n in lengths]
    return {
        "response_input_ids": texts,
        "response_completion_mask": [[0] + [1] * (len(text) - 1) for text in texts],
        "scores": scores,
        "objective": objective,
    }


def test_batches_hold_the_lists_one_after_the_other_and_index_their_pairs():
    rows = [ranked([2, 3, 2], [1.0, 3.0, 2.0]), ranked([4, 2], [0.0, 5.0], objective=1)]
    batch = PreferenceCollator(0)(rows)
    texts = [text for row in rows for text in row["response_input_ids"]]
    assert batch["input_ids"].shape == (5, 4)
    for ids, text in zip(batch["input_ids"].tolist(), texts, strict=True):
        assert ids == text + [0] * (4 - len(text))
    assert batch["pairs"].dtype == torch.int64
    assert batch["pairs"].tolist() == [[1, 0], [1, 2], [2, 0], [4, 3]]
    assert batch["objective"].tolist() == [0, 0, 0, 1]
    packed = PreferenceCollator(0, padding_free=True)(rows)
    assert packed["input_ids"][0].tolist() == [token for text in texts for token in text]
    assert packed["pairs"].equal(batch["pairs"])
    assert packed["position_ids"][0].tolist() == [i for text in texts for i in range(len(text))]


def test_score_pairs_are_all_pairs_with_different_scores():
    scores = [1.0, 2.0, 2.0, -1.0]
    pairs = score_pairs(scores)
    assert all(scores[i] > scores[j] for i, j in pairs) and len(set(pairs)) == len(pairs) == 5


def test_batches_that_make_no_sense_are_refused():
    pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    collate = PreferenceCollator(0)
    with pytest.raises(ValueError, match="got 1 pairs and 1 ranked lists in one batch"):
        collate([pair, ranked([2, 2], [0.0, 1.0])])
    for scores, message in (
        ([1.0], "scores must be 2 finite numbers"),
        ([1.0, float("nan")], "scores must be 2 finite numbers"),
        ([1.0, 1.0], "scores must hold two different ones"),
    ):
        with pytest.raises(ValueError, match=message):
            collate([ranked([2, 2], scores)])


@pytest.mark.parametrize("padding_free", [False, True])
def test_hidden_states_go_back_to_the_texts_they_are_of(padding_free):
    """After the cache has split and padded them, a batch's hidden states are the original ones."""
    rows = [ranked([2, 3, 2], [1.0, 3.0, 2.0]), ranked([4, 2], [0.0, 5.0])]
    plain = PreferenceCollator(0, padding_free=padding_free)
    batch = plain(rows)
    hidden = torch.randn(*batch["input_ids"].shape, 3)
    mask = batch.get("attention_mask")
    if mask is not None:
        hidden = hidden * mask[..., None]
    _, lengths = rows_identity(rows)
    assert lengths == [(2, 3, 2), (4, 2)]
    states = split_rows(hidden, mask, lengths, ranked=True)
    carrying = [
        {**row, "hidden_states": (part.split(sizes), torch.float32)}
        for row, part, sizes in zip(rows, states, lengths, strict=True)
    ]
    again = HiddenCollator(plain)(carrying)
    assert again["hidden_states"].equal(hidden) and again["pairs"].equal(batch["pairs"])
