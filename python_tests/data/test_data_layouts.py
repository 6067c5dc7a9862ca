# SPDX-License-Identifier: Apache-2.0
"""Files and datasets that users have: encodings, compression, folders, layouts of other projects.

The trainer takes the same data as the loader.
"""

import bz2
import codecs
import gzip
import json
import lzma
import sys

import pytest
from tiny_models import make_model
from trainer_cases import arguments, pairs
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import ASSISTANT, HUMAN, load_preference_data, preference_rows
from dualhead_ext.data.files import read_file

ROWS = [
    {"prompt": "Q: é?", "chosen": " yes", "rejected": " no, “no”"},
    {"prompt": "R?", "chosen": " 是", "rejected": " 不\n2"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
needs_datasets = pytest.mark.skipif(
    __import__("importlib").util.find_spec("datasets") is None,
    reason="the extra data is not installed",
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", codecs.BOM_UTF8 + LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-16-le")),
        ("a.jsonl", codecs.BOM_UTF16_BE + LINES.encode("utf-16-be")),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", codecs.BOM_UTF8 + json.dumps(ROWS, indent=2).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("a.jsonl", gzip.compress(LINES.encode())),
        ("a", gzip.compress(LINES.encode("utf-16"))),
        ("a.jsonl.gz", LINES.encode()),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("a.txt", LINES.encode()),
    ],
)
def test_files_are_known_by_their_bytes(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert load_preference_data(tmp_path / name) == ROWS


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("packed", [False, True])
def test_csv(delimiter, packed, tmp_path):
    pandas = pytest.importorskip("pandas")
    text = pandas.DataFrame(ROWS).to_csv(index=False, sep=delimiter).encode()
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(text) if packed else text)
    assert load_preference_data(path) == ROWS


def test_csv_cells(tmp_path):
    ask, said = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "it's"}]
    other = [{"role": "assistant", "content": "no"}]
    header = "prompt,chosen,rejected,objective\n"

    def quoted(*cells):
        return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"

    rows = [
        quoted(json.dumps(ask), str(said), json.dumps(other), "1"),
        quoted("Q", " a" * 200_000, "", ""),
        quoted("Q", "[1] is a citation", "42", ""),
    ]
    (tmp_path / "a.csv").write_text(header + "".join(rows))
    data = load_preference_data(tmp_path / "a.csv")
    assert data[0] == {"prompt": ask, "chosen": said, "rejected": other, "objective": 1}
    assert data[1] == {"prompt": "Q", "chosen": "[1] is a citation", "rejected": "42"}
    assert data.report.skipped == {"rejected is null": [3]}
    (tmp_path / "b.csv").write_text(header + "a,b\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 2: expected 4 cells"):
        load_preference_data(tmp_path / "b.csv")


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra data is not installed")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.data")
    assert load_preference_data(tmp_path / "a.data") == ROWS
    whole = (tmp_path / "a.data").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:200])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        load_preference_data(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow package: pip install 'dualhead_ext\[data\]'"):
        load_preference_data(tmp_path / "a.data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04abc", "a zip archive: unpack it"),
        (b"\x28\xb5\x2f\xfdabc", "compressed with zstd"),
    ],
)
def test_files_of_other_kinds_are_named(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_preference_data(tmp_path / "a.jsonl")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(LINES)
    assert load_preference_data("~/a.jsonl") == ROWS
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_preference_data("~/b.jsonl")


@needs_datasets
def test_folders_of_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert load_preference_data(tmp_path / "one") == ROWS
    with pytest.raises(ValueError, match="split must be None for"):
        load_preference_data(tmp_path / "one", split="test")
    datasets.DatasetDict(train=data.select([0]), test=data.select([1])).save_to_disk(
        tmp_path / "two"
    )
    assert load_preference_data(tmp_path / "two") == ROWS[:1]
    assert load_preference_data(tmp_path / "two", split="test") == ROWS[1:]
    with pytest.raises(ValueError, match="split must be one of train, test for"):
        load_preference_data(tmp_path / "two", split="dev")
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / "README.md").write_text("---\nlicense: mit\n---\n")
    data.select([0]).to_parquet(clone / "data" / "train-00000-of-00001.parquet")
    data.select([1]).to_parquet(clone / "data" / "test-00000-of-00001.parquet")
    assert load_preference_data(clone) == ROWS[:1]
    assert load_preference_data(clone, split="test") == ROWS[1:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be read as a dataset"):
        load_preference_data(tmp_path / "empty")


def test_folders_need_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"is a folder, which needs the datasets package: pip"):
        load_preference_data(tmp_path)


# --- layouts --------------------------------------------------------------------------------------


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASK, YES, NO = [user("Hi")], [assistant("Yes")], [assistant("No")]
EXPECTED = {"prompt": ASK, "chosen": YES, "rejected": NO}
DIALOGUE = f"{HUMAN} Hi{ASSISTANT}"
PARTS = [{"type": "text", "text": "Ye"}, {"type": "text", "text": "s", "index": None}]
LAYOUTS = {
    "messages": ({"prompt": ASK, "chosen": YES, "rejected": NO}, EXPECTED),
    "UltraFeedback": ({"prompt": "Hi", "chosen": ASK + YES, "rejected": ASK + NO}, EXPECTED),
    "a string and answers": ({"prompt": "Hi", "chosen": YES, "rejected": NO}, EXPECTED),
    "the prompt repeated": ({"prompt": ASK, "chosen": ASK + YES, "rejected": ASK + NO}, EXPECTED),
    "no prompt": ({"chosen": ASK + YES, "rejected": ASK + NO}, EXPECTED),
    "one answer, then more": (
        {"chosen": ASK + YES, "rejected": ASK + YES + [user("So?")] + NO},
        {"prompt": ASK, "chosen": YES, "rejected": [*YES, user("So?"), *NO]},
    ),
    "parts": (
        {"prompt": ASK, "chosen": [{"role": "assistant", "content": PARTS}], "rejected": NO},
        EXPECTED,
    ),
    "null fields": (
        {"prompt": [user("Hi") | {"tool_calls": None}], "chosen": YES, "rejected": NO, "x": None},
        EXPECTED,
    ),
    "a dialogue repeated": (
        {"prompt": DIALOGUE, "chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"},
        {"prompt": DIALOGUE, "chosen": " a", "rejected": " b"},
    ),
    "a text repeated": (
        {"prompt": "Q: hm?", "chosen": "Q: hm? a", "rejected": "Q: hm? b"},
        {"prompt": "Q: hm?", "chosen": " a", "rejected": " b"},
    ),
    "whole texts": (
        {"chosen": "Q: who came? Adam", "rejected": "Q: who came? Ada"},
        {"prompt": "Q: who came?", "chosen": " Adam", "rejected": " Ada"},
    ),
    "null columns of ranked lists": (
        {"prompt": "Q", "chosen": " a", "rejected": " b", "responses": None, "scores": None},
        {"prompt": "Q", "chosen": " a", "rejected": " b"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, expected = LAYOUTS[name]
    assert preference_rows([row]) == [expected]


def test_answers_that_begin_as_their_question_are_answers():
    rows = [
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi."},
        {"prompt": "Ho", "chosen": "Yes", "rejected": "No"},
    ]
    assert preference_rows(rows) == rows


def test_tool_calls_stay():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (row,) = preference_rows([{"prompt": ASK, "chosen": [call], "rejected": NO}])
    assert row["chosen"] == [call | {"content": ""}]


def test_rows_that_cannot_be_used_are_counted():
    picture = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    rows = [
        EXPECTED,
        EXPECTED | {"rejected": None},
        EXPECTED | {"chosen": None},
        EXPECTED | {"prompt": [picture]},
        EXPECTED | {"chosen": [user("And?")]},
    ]
    data = preference_rows(rows, "mine")
    assert data == [EXPECTED]
    assert data.report.skipped == {
        "rejected is null": [1],
        "chosen is null": [2],
        "a message holds a part of type image": [3],
        "empty response": [4],
    }
    assert "mine: 1 pairs; skipped 1 (rejected is null; row 1)" in str(data.report)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "x"}, "a message must have a role, got content"),
        ({"role": "assistant"}, "a message's content must be text, got NoneType"),
        ({"role": "assistant", "content": 3}, "a message's content must be text, got int"),
        (
            {"role": "assistant", "content": [{"text": 3}]},
            "the parts of a message's content must be",
        ),
    ],
)
def test_broken_messages(message, expected):
    with pytest.raises(ValueError, match=f"row 0: {expected}"):
        preference_rows([EXPECTED | {"chosen": [message]}])


# --- the trainer ----------------------------------------------------------------------------------

TEXTS = [{"prompt": f"Q {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(4)]


def trainer_of(folder, tokenizer, rows, held_out=None, model=None, **changes):
    sizes = {"vocab_size": len(tokenizer)}
    return dh.DualHeadTrainer(
        model=make_model("llama", sizes=sizes) if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )


@needs_datasets
def test_the_trainer_takes_what_the_loader_takes(tmp_path, tokenizer):
    import datasets
    import pandas

    expected = list(trainer_of(tmp_path, tokenizer, TEXTS).train_dataset)
    with_null = [*TEXTS, TEXTS[0] | {"rejected": None}]
    for rows in (
        datasets.Dataset.from_list(with_null),
        pandas.DataFrame(with_null),
        pandas.DataFrame(with_null).iloc[::1].set_index("prompt", drop=False),
        tuple(with_null),
    ):
        assert list(trainer_of(tmp_path, tokenizer, rows).train_dataset) == expected
    ultra = [{"prompt": "Hi", "chosen": ASK + YES, "rejected": ASK + NO, "score_chosen": 8.5}]
    plain = trainer_of(tmp_path, tokenizer, [EXPECTED]).train_dataset
    assert trainer_of(tmp_path, tokenizer, datasets.Dataset.from_list(ultra)).train_dataset == plain
    whole = [{"chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"}]
    assert (
        len(trainer_of(tmp_path, tokenizer, datasets.Dataset.from_list(whole)).train_dataset) == 1
    )
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(TEXTS), test=datasets.Dataset.from_list(TEXTS)
    )
    with pytest.raises(TypeError, match="train_dataset must be rows, got a DatasetDict of train"):
        trainer_of(tmp_path, tokenizer, splits)
    trainer = trainer_of(tmp_path, tokenizer, splits["train"], splits)
    assert set(trainer.eval_dataset) == {"train", "test"}


def test_raw_rows_are_evaluated(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, TEXTS, TEXTS)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(TEXTS)["eval_loss"] == expected
    assert trainer.evaluate({"a": TEXTS})["eval_a_loss"] == expected
    assert len(trainer.predict(TEXTS).predictions) == 4


def test_rows_that_a_template_or_tokenizer_refuses_are_named(tmp_path, tokenizer, caplog):
    fussy = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    fussy.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    system = EXPECTED | {"prompt": [{"role": "system", "content": "x"}, *ASK]}
    surrogate = EXPECTED | {"chosen": [assistant("\ud800")]}
    trainer = trainer_of(tmp_path, fussy, [EXPECTED, system, EXPECTED, surrogate])
    assert len(trainer.train_dataset) == 2
    assert "skipped 1 (no system role; row 1)" in caplog.text and "; row 3)" in caplog.text
    with pytest.raises(ValueError, match=r"no usable row in .*no system role; row 0"):
        trainer_of(tmp_path, fussy, [system])


# --- limits ---------------------------------------------------------------------------------------


def test_limits_of_the_embeddings_are_known_beforehand(tmp_path, tokenizer):
    small = make_model("llama")
    message = (
        r"token ids must be below 101, the rows of the backbone's embedding, got \d{3,} in row 0"
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizer, TEXTS, model=small)
    negative = {"prompt_ids": [-1], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(ValueError, match=r"token ids must be below 101.*got -1 in row 1"):
        trainer_of(tmp_path, tokenizer, [*pairs(1), negative], model=small)
    padding = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    padding.add_special_tokens({"pad_token": "<|new pad|>"})
    model = make_model("llama", sizes={"vocab_size": len(tokenizer)})
    size, got = len(tokenizer), padding.pad_token_id
    with pytest.raises(ValueError, match=f"pad_token_id must be below {size}.*got {got}"):
        trainer_of(tmp_path, padding, TEXTS, model=model)


def test_learned_positions_are_known_beforehand(tmp_path, tokenizer):
    sizes = {"vocab_size": len(tokenizer), "n_positions": 32}
    long = [TEXTS[0], TEXTS[1] | {"chosen": " yes" * 100}]
    message = r"at most 32 tokens.*got 40 in row 1 \(max_length=40\)"
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tokenizer, long, model=make_model("gpt2", sizes=sizes), max_length=40)
    trainer = trainer_of(
        tmp_path, tokenizer, TEXTS[:1], model=make_model("gpt2", sizes=sizes), max_length=32
    )
    with pytest.raises(ValueError, match="eval_dataset: texts must have at most 32 tokens"):
        trainer._max_length = 40
        trainer.evaluate(long)
    rotary = make_model(
        "llama", sizes={"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    )
    trainer_of(tmp_path, tokenizer, long, model=rotary, max_length=40)


def test_read_file_names_who_asked(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"^read_file: .* is a folder"):
        read_file(tmp_path)
