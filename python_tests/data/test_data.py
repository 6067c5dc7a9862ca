# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: the irregularities of HH-RLHF, TRL's layouts, skipped rows, and refusals."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualhead_ext.data import (
    ASSISTANT,
    HUMAN,
    embedded_pairs_path,
    load_preference_data,
    read_jsonl,
)
from dualhead_ext.data.texts import split_dialogues

DATA = Path(os.environ.get("DUALHEAD_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="DUALHEAD_DATA names no folder with the full data"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt, chosen, rejected):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


PROMPT = f"{HUMAN} Hi{ASSISTANT}"
ODDITIES = {
    "a further turn in one response": (PROMPT, f" Yes.{HUMAN} And?{ASSISTANT} No.", " No."),
    "the role repeated": (f"{PROMPT} Well{ASSISTANT}", " yes", " no"),
    "a marker in running text": (f"{HUMAN} Human: hi Assistant: x{ASSISTANT}", " yes", " no"),
    "one a prefix of the other": (PROMPT, " Yes", " Yes, but no"),
    "an empty turn in mid-dialogue": (f"{HUMAN} a{ASSISTANT}{HUMAN} b{ASSISTANT}", " yes", " no"),
    "four line breaks": (f"{HUMAN} Hi\n\n{ASSISTANT}", " yes", " no"),
    "other scripts": (f"{HUMAN} \u2019é😀{ASSISTANT}", " 是", " 不"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_hh_prompts_are_the_common_prefix(oddity, tmp_path):
    prompt, chosen, rejected = ODDITIES[oddity]
    data = load_preference_data(write(tmp_path / "a.jsonl", [pair(prompt, chosen, rejected)]))
    assert data == [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]


TURN = st.text(st.sampled_from("ab \n:\u2019HA"), max_size=6)


@given(st.lists(TURN, min_size=1, max_size=3), TURN, TURN)
def test_splitting_loses_nothing(turns, chosen, rejected):
    prompt = "".join(f"{HUMAN}{turn}{ASSISTANT}" for turn in turns)
    got, a, b = split_dialogues(prompt + chosen, prompt + rejected)
    assert got + a == prompt + chosen and got + b == prompt + rejected
    assert got.endswith(ASSISTANT) and len(got) >= len(prompt)


def test_trl_layouts(tmp_path):
    ask = [{"role": "user", "content": "Hi"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    rows = [
        {"prompt": "Q:", "chosen": " yes", "rejected": " no", "objective": 1},
        {"prompt": ask, "chosen": yes, "rejected": no},
        {"chosen": ask + yes, "rejected": ask + no},
    ]
    data = load_preference_data(write(tmp_path / "a.jsonl", rows))
    assert data[0] == rows[0]
    assert data[1] == data[2] == rows[1]


def test_unusable_rows_are_skipped_and_said(tmp_path, caplog):
    rows = [
        pair(PROMPT, " yes", " no"),
        pair(PROMPT, " yes", " yes"),
        pair(PROMPT, " \n", " no"),
        {"chosen": "no dialogue", "rejected": "at all"},
        pair(PROMPT, " ", " no"),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = load_preference_data(path)
    assert len(data) == data.report.kept == 1
    assert data.report.skipped == {
        "chosen equals rejected": [2],
        "empty response": [3, 5],
        "no prompt, and no beginning in common": [4],
    }
    assert "1 pairs; skipped 1 (chosen equals rejected; line 2)" in str(data.report)
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"chosen": "a"}\n', ValueError, "line 1: expected columns chosen and rejected"),
        ('{"chosen": 1, "rejected": 2}\n', ValueError, "line 1: expected a string or a list"),
        (
            '\n{"chosen": "a", "rejected": [{"role": "user", "content": "x"}]}\n',
            ValueError,
            "line 2",
        ),
        ('{"chosen": "a", "rejected": "b"\n', ValueError, "line 1: not JSON"),
        ("[1]\n", ValueError, "row 0: expected an object, got int"),
        ("", ValueError, "no usable row"),
        ('{"a": 1}\n[1]\n', ValueError, "line 1: expected columns"),
        (
            json.dumps({"a" * 5000: 1} | {f"c{i}": 1 for i in range(500)}),
            ValueError,
            "line 1: expected columns .{,200}got a{40} .{,10}a{40}, c0, c1, c2, c3 and 496 more$",
        ),
        (
            json.dumps({"prompt": "a", "chosen": [{"b" * 5000: 1}], "rejected": "c"}),
            ValueError,
            "a message must have a role, got b{40} .{,10}b{40}$",
        ),
        (b"\xff\xfe\n", ValueError, "not UTF-16"),
        (b'{"chosen": "\xe9"}', ValueError, "not UTF-8"),
        ("[" * 100_000, ValueError, "not a JSON array"),
        ('{"a":' + "[" * 100_000, ValueError, "line 1"),
        (
            '{"prompt":"p","chosen":"a","rejected":"b","objective":-1}\n',
            ValueError,
            "objective must",
        ),
    ],
)
def test_broken_files_are_refused_by_line(content, error, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message) as caught:
        load_preference_data(path)
    assert str(path) in str(caught.value)


def test_a_compressed_file_that_breaks_off(tmp_path):
    whole = embedded_pairs_path().read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"after line \d+: cannot be read"):
        load_preference_data(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load_preference_data(tmp_path / "b.jsonl.gz")


def test_missing_files_and_wrong_splits(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.jsonl"):
        load_preference_data(tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file \./gone"):
        load_preference_data("./gone")
    with pytest.raises(ValueError, match="split must be None for a file"):
        load_preference_data(write(tmp_path / "a.jsonl", [pair(PROMPT, "a", "b")]), split="train")
    with pytest.raises(ValueError, match="split must be one of train, test"):
        load_preference_data("embedded", split="dev")


def test_hub_names_need_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dualhead_ext\[data\]'"):
        load_preference_data("someone/pairs")


def test_hub_names_go_through_datasets(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    rows = [pair(PROMPT, " yes", " no")]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows)
    )
    assert load_preference_data("someone/pairs")[0]["prompt"] == PROMPT


def test_the_embedded_sample():
    train, test = (load_preference_data("embedded", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1162, 400)
    assert not train.report.skipped and not test.report.skipped
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    with gzip.open(embedded_pairs_path(), "rb") as file:
        assert file.read(1) == b"{"
    header = embedded_pairs_path().read_bytes()[:10]
    # The gzip header has no file name and no time, so that the file is reproducible
    assert header[3] == 0 and header[4:8] == bytes(4)


@needs_data
@pytest.mark.parametrize(("name", "count"), [("hh-rlhf/train", 2362), ("hh-rlhf/test", 800)])
def test_the_real_files_whole(name, count):
    data = load_preference_data(DATA / f"{name}.jsonl.gz")
    assert len(data) == count and not data.report.skipped
    for row, (_, raw) in zip(data, read_jsonl(DATA / f"{name}.jsonl.gz"), strict=True):
        assert row["prompt"] + row["chosen"] == raw["chosen"]
        assert row["prompt"] + row["rejected"] == raw["rejected"]
        assert row["prompt"].endswith(ASSISTANT)


@needs_data
def test_the_sample_is_cut_from_the_real_files():
    for split in ("train", "test"):
        rows = (row for _, row in read_jsonl(DATA / f"hh-rlhf/{split}.jsonl.gz"))
        expected = [row["chosen"] for row in rows if row["subset"] == "harmless-base"]
        assert [row["chosen"] for _, row in read_jsonl(embedded_pairs_path(split))] == expected
