# SPDX-License-Identifier: Apache-2.0
"""The prompts for the compared systems: each file's layout and irregularities.

The tests use small files of the same layout, and the real files if DUALHEAD_DATA names their
folder.
"""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from dualhead_ext.data import ASSISTANT, HUMAN
from dualhead_ext.eval import prompts

DATA = Path(os.environ.get("DUALHEAD_DATA", "/nonexistent"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="DUALHEAD_DATA names no folder with the full data"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_truthfulqa(path, *rows, bom=False):
    names = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
    with open(path, "w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "Source"])
        writer.writerows([["Adversarial", "Law", *row, "https://x"] for row in rows])
    return path


# --- where files are looked for -------------------------------------------------------------------


def test_without_the_variable_a_source_must_be_given(monkeypatch, tmp_path):
    monkeypatch.delenv("DUALHEAD_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"below \$DUALHEAD_DATA, which is not set"):
        prompts.beavertails()
    monkeypatch.setenv("DUALHEAD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file .*truthfulqa.csv"):
        prompts.truthfulqa()
    write(tmp_path / "alpaca_eval_prompts.jsonl", [{"instruction": "Hi", "dataset": "a"}])
    assert prompts.alpaca_eval()[0] == {
        "prompt": f"{HUMAN} Hi{ASSISTANT}",
        "question": "Hi",
        "dataset": "a",
    }


def test_hub_names_go_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    asked = []
    rows = {
        "type": "x",
        "category": "y",
        "question": "Q?",
        "best_answer": "a",
        "correct_answers": ["a", "b"],
        "incorrect_answers": ["c"],
    }

    def load(*names, split):
        asked.append((*names, split))
        return datasets.Dataset.from_list([rows])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = prompts.truthfulqa("truthfulqa/truthful_qa")
    assert (row["best"], row["correct"], row["incorrect"]) == ("a", ("a", "b"), ("c",))
    assert asked == [("truthfulqa/truthful_qa", "generation", "validation")]


# --- HH-RLHF --------------------------------------------------------------------------------------


def test_hh_prompts_are_distinct_and_whole(tmp_path):
    first, second = f"{HUMAN} Hi{ASSISTANT}", f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT}"
    rows = [
        {"chosen": first + " yes", "rejected": first + " no", "subset": "helpful-base"},
        {"chosen": second + " x", "rejected": f"{second} y{HUMAN} z{ASSISTANT} w"},
        {"chosen": first + " other", "rejected": first + " no"},
    ]
    got = prompts.hh_prompts(write(tmp_path / "a.jsonl", rows))
    assert [row["prompt"] for row in got] == [first, second]
    assert got[0]["chosen"] == " yes" and got[0]["subset"] == "helpful-base"
    assert [row["question"] for row in got] == ["Hi", f"a{ASSISTANT} b{HUMAN} c"]
    assert got.report.kept == 2 and "2 prompts" in str(got.report)
    messages = [{"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("x", "y")]
    other = {"prompt": messages, "chosen": answers[0], "rejected": answers[1]}
    with pytest.raises(ValueError, match="must hold dialogues as strings"):
        prompts.hh_prompts(write(tmp_path / "b.jsonl", [other]))


def test_the_embedded_pairs_are_hh_too():
    assert len(prompts.hh_pairs("embedded")) == 400
    assert len(prompts.hh_pairs("embedded", "train")) == 1162


@needs_data
def test_hh_of_the_real_file():
    pairs, asked = prompts.hh_pairs(), prompts.hh_prompts()
    assert Counter(row["subset"] for row in pairs) == {"helpful-base": 400, "harmless-base": 400}
    assert {row["prompt"] for row in asked} == {row["prompt"] for row in pairs}
    assert len(asked) == len({row["prompt"] for row in asked})


# --- PKU-SafeRLHF ---------------------------------------------------------------------------------


def saferlhf_row(better=0, safer=1, **changes):
    row = {"prompt": "Q ", "response_0": "zero", "response_1": " one\n"}
    return row | {"better_response_id": better, "safer_response_id": safer} | changes


def test_saferlhf_has_a_row_for_each_objective(tmp_path):
    data = prompts.saferlhf_pairs(write(tmp_path / "a.jsonl", [saferlhf_row()]))
    prompt = f"{HUMAN} Q{ASSISTANT}"
    assert data == [
        {"prompt": prompt, "chosen": " zero", "rejected": " one", "objective": prompts.HELPFUL},
        {"prompt": prompt, "chosen": " one", "rejected": " zero", "objective": prompts.HARMLESS},
    ]
    plain = prompts.saferlhf_pairs(tmp_path / "a.jsonl", template=lambda text: f"Q: {text} A:")
    assert plain[0]["prompt"] == "Q: Q A:"


def test_saferlhf_skips_and_refuses(tmp_path):
    rows = [saferlhf_row(), saferlhf_row(response_0=" "), saferlhf_row(response_0="one")]
    rows[2]["response_1"] = "one"
    data = prompts.saferlhf_pairs(write(tmp_path / "a.jsonl", rows))
    assert data.report.skipped == {"an empty response or two equal ones": [2, 3]}
    for row in (saferlhf_row(better=2), saferlhf_row(better=True), saferlhf_row(safer=None)):
        with pytest.raises(ValueError, match=r"line 1: expected (better|safer)_response_id 0 or 1"):
            prompts.saferlhf_pairs(write(tmp_path / "b.jsonl", [row]))
    with pytest.raises(ValueError, match="line 1: expected strings prompt, response_0"):
        prompts.saferlhf_pairs(write(tmp_path / "c.jsonl", [{"prompt": "Q", "response_0": "a"}]))
    with pytest.raises(ValueError, match="no usable row"):
        prompts.saferlhf_pairs(write(tmp_path / "d.jsonl", rows[1:]))


@needs_data
def test_saferlhf_of_the_real_file():
    data = prompts.saferlhf_pairs()
    assert Counter(row["objective"] for row in data) == {0: 32, 1: 32}
    halves = (data[k::2] for k in (prompts.HELPFUL, prompts.HARMLESS))
    assert sum(a["chosen"] != b["chosen"] for a, b in zip(*halves, strict=True)) == 19
    assert len({row["prompt"] for row in data}) == 31


# --- TruthfulQA -----------------------------------------------------------------------------------


def test_truthfulqa_answers(tmp_path):
    path = write_truthfulqa(
        tmp_path / "a.csv",
        ["Is it? ", "No", "No; Not, ever;", "Yes;  Yes, it is;Yes; "],
        ["Who?", "Nobody", "Nobody; Unknown", "You; Unknown"],
        ['"Q", he said\nwhat?', "a", "b; a", "a; c"],
        bom=True,
    )
    data = prompts.truthfulqa(path)
    assert data[0] == {
        "prompt": f"{HUMAN} Is it?{ASSISTANT}",
        "question": "Is it?",
        "category": "Law",
        "type": "Adversarial",
        "best": "No",
        "correct": ("No", "Not, ever"),
        "incorrect": ("Yes", "Yes, it is"),
    }
    assert (data[1]["correct"], data[1]["incorrect"]) == (("Nobody",), ("You",))
    assert (data[2]["correct"], data[2]["incorrect"]) == (("b", "a"), ("c",))


def test_truthfulqa_refuses(tmp_path):
    cases = {
        "best_answer to be one of": ["Q", "x", "a; b", "c"],
        "at least one incorrect answer": ["Q", "a", "a; b", " ; "],
    }
    for message, row in cases.items():
        with pytest.raises(ValueError, match=f"line 2: expected {message}"):
            prompts.truthfulqa(write_truthfulqa(tmp_path / "a.csv", ["Q", "a", "a", "b"], row))
    (tmp_path / "b.csv").write_text("Type,Question\nx,y\n")
    with pytest.raises(ValueError, match="line 1: expected columns category, best_answer"):
        prompts.truthfulqa(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="split must be None for a file"):
        prompts.truthfulqa(tmp_path / "a.csv", split="test")


@needs_data
def test_truthfulqa_of_the_real_file():
    data = prompts.truthfulqa()
    assert Counter(row["type"] for row in data) == {"Adversarial": 437, "Non-Adversarial": 380}
    assert len({row["category"] for row in data}) == 38
    for row in data:
        answers = (*row["correct"], *row["incorrect"])
        assert row["best"] in row["correct"] and row["incorrect"]
        assert len(set(answers)) == len(answers) and row["question"].strip() == row["question"]
        assert all(text == text.strip("; ") and text for text in answers)


# --- MT-Bench, AlpacaEval, BeaverTails ------------------------------------------------------------


def test_mt_bench_has_two_turns(tmp_path):
    questions = [
        {"question_id": 1, "category": "math", "turns": ["a?", "b?"], "reference": ["x", "y"]},
        {"question_id": 2, "category": "writing", "turns": ["c?", "d?"], "reference": []},
    ]
    answers = [{"question_id": 1, "choices": [{"turns": ["p", "q"]}]}]
    source = write(tmp_path / "q.jsonl", questions)
    data = prompts.mt_bench(source, write(tmp_path / "r.jsonl", answers))
    assert data[0]["prompt"] == f"{HUMAN} a?{ASSISTANT}"
    assert (data[0]["reference"], data[0]["reference_gpt4"]) == (("x", "y"), ("p", "q"))
    assert (data[1]["reference"], data[1]["reference_gpt4"]) == (None, None)
    again = prompts.second_turn(data[0], " Two.\n")
    assert again == f"{HUMAN} a?{ASSISTANT} Two.{HUMAN} b?{ASSISTANT}"
    assert prompts.mt_bench(source)[0]["reference_gpt4"] is None
    with pytest.raises(ValueError, match="line 1: expected the question_id of a question, got 9"):
        prompts.mt_bench(source, write(tmp_path / "r.jsonl", [{"question_id": 9}]))
    with pytest.raises(ValueError, match="line 1: expected question_id and two turns"):
        prompts.mt_bench(write(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["a"]}]))


@needs_data
def test_mt_bench_of_the_real_files():
    data = prompts.mt_bench()
    assert Counter(row["category"] for row in data) == dict.fromkeys(
        "writing roleplay reasoning math coding extraction stem humanities".split(), 10
    )
    assert all(len(row["turns"]) == 2 for row in data)
    for name, count in (("reference", 39), ("reference_gpt4", 30)):
        given = [row[name] for row in data if row[name] is not None]
        assert len(given) == count and all(len(answers) == 2 for answers in given)


def test_single_questions_are_stripped_and_once(tmp_path):
    rows = [{"prompt": text, "category": "c"} for text in ("Hi ", "Hi", " ", "Ho")]
    data = prompts.beavertails(write(tmp_path / "a.jsonl", rows))
    assert [row["question"] for row in data] == ["Hi", "Ho"]
    assert data.report.skipped == {"a repeat": [2], "empty": [3]}
    with pytest.raises(ValueError, match="line 1: expected a string instruction"):
        prompts.alpaca_eval(tmp_path / "a.jsonl")


@needs_data
def test_single_questions_of_the_real_files():
    alpaca, beaver = prompts.alpaca_eval(), prompts.beavertails()
    assert (len(alpaca), len(beaver)) == (150, 700)
    assert not alpaca.report.skipped and not beaver.report.skipped
    assert set(Counter(row["category"] for row in beaver).values()) == {50}
    assert all(row["question"] == row["question"].strip() for row in (*alpaca, *beaver))
