# SPDX-License-Identifier: Apache-2.0
"""``dualhead sample``: the command, and the rows that it writes."""

import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli.sample import load_prompts
from dualhead_ext.data.collate import tokenize_pairs
from dualhead_ext.eval import sampling
from dualhead_ext.eval.open_prompts import SPLITS, open_prompts

RULE = "def vowels(prompt, response):\n    return sum(c in 'aeiou' for c in response)\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "rule.py").write_text(RULE)
    (tmp_path / "questions.txt").write_text("".join(f"What is {i}?\n" for i in range(12)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*more: str) -> list[str]:
    options = {"--prompts": "questions.txt", "--scorer": "rule:vowels", "-n": 3,
               "--max-new-tokens": 12, "--batch-size": 6, "--out": "ranked.jsonl"}  # fmt: skip
    return ["sample", *(str(x) for pair in options.items() for x in pair), *more]


def run(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return stop.code


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_ranked_and_train_reads_them(place, capsys):
    assert run(*command()) == 0
    assert "ranked responses to 12 prompts" in capsys.readouterr().out
    rows = rows_of(place / "ranked.jsonl")
    questions = [row["prompt"][0]["content"] for row in rows]
    assert questions == [f"What is {i}?" for i in range(12)]
    for row in rows:
        texts = [response[0]["content"] for response in row["responses"]]
        assert row["scores"] == [sum(c in "aeiou" for c in text) for text in texts]
        assert len(row["ended"]) == len(texts) <= 3
        assert not any("Human:" in text for text in texts)
    kept = dh.data.load_preference_data(place / "ranked.jsonl")
    assert kept and {"prompt", "responses", "scores", "ended"} <= set(kept[0])


@pytest.mark.slow
def test_a_killed_run_resumes_without_repeating_work(place):
    """The file at the end is that of an uninterrupted run, also if the batch size has changed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    argv = [sys.executable, "-m", "dualhead_ext.cli", *command("--max-new-tokens", "60")]
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path = place / "ranked.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if path.is_file() and path.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = path.read_bytes().count(b"\n")
    assert there >= 2
    with open(path, "ab") as file:
        file.write(b'{"prompt": [{"role": "us')  # as if killed in the middle of a line
    assert run(*command("--max-new-tokens", "60", "--batch-size", "9")) == 0
    rows = rows_of(path)
    path.unlink()
    assert run(*command("--max-new-tokens", "60")) == 0
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in rows_of(path)]
    same = [a == b for a, b in zip(rows, rows_of(path), strict=True)]
    assert sum(same) >= len(same) - 1  # another batch rounds differently, which may change one draw


def test_mistakes_are_one_sentence(place, capsys):
    assert run(*command("--limit", "2")) == 0
    before = (place / "ranked.jsonl").read_bytes()
    capsys.readouterr()
    (place / "empty.txt").write_text("\n\n")
    (place / "rows.jsonl").write_text('{"question": "Why?"}\n')
    (place / "foreign.jsonl").write_text('{"prompt": "Why?"}\n')
    (place / "deep.jsonl").write_text(100_000 * "[" + "\n")
    for argv, message in (
        (command("--seed", "1"), "holds rows of another run"),
        (command("--scorer", "nobody", "--out", "new.jsonl"), "--scorer: scorer: expected one of"),
        (command("--prompts", "empty.txt"), "--prompts: expected at least one prompt"),
        (command("--prompts", "rows.jsonl"), "line 1: prompt must be"),
        (command("--prompts", "absent.txt"), "--prompts:"),
        (command("--prompts", "open:all"), "split must be one of"),
        (command("--out", "foreign.jsonl"), "line 1 of foreign.jsonl is not a row"),
        (command("--out", "deep.jsonl"), "line 1 of deep.jsonl is not a row"),
        (command("--out", "ranked.json"), "ends in .jsonl"),
        (command("-n", "1"), "at least 2"),
    ):
        assert run(*argv) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert (place / "ranked.jsonl").read_bytes() == before
    assert not (place / "new.jsonl").exists()
    assert (place / "foreign.jsonl").read_text() == '{"prompt": "Why?"}\n'


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(place, capsys):
    """The row that did not fit is cut off in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert run(*command()) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "dualhead sample: --out: [Errno 27] File too large\n" in capsys.readouterr().err
    assert (place / "ranked.jsonl").stat().st_size == 1000
    assert run(*command()) == 0
    assert len({json.dumps(row["prompt"]) for row in rows_of(place / "ranked.jsonl")}) == 12


def test_a_second_run_at_the_same_time_is_refused(place, capsys):
    import fcntl

    with open(place / "ranked.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(*command()) == 2
    assert "another run is writing" in capsys.readouterr().err


# --- the sampler ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone():
    path = dh.data.embedded_backbone_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def gated():
    """The same backbone with a head whose weights are not zero."""
    torch.manual_seed(0)
    path = dh.data.embedded_backbone_path()
    model = dh.DualHeadForCausalLM.from_backbone(path, dtype=torch.float32, gate="attention")
    with torch.no_grad():
        for parameter in model.lm_head_module.reward_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for parameter in model.lm_head_module.gate.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), AutoTokenizer.from_pretrained(path)


PROMPTS = ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: How do I bake a loaf of bread?\n\nAssistant:"]


def test_the_noise_samples_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    noise = sampling.RowNoise([sampling.row_seed(i) for i in range(4000)], 2.0, logits.device)
    drawn = noise(None, logits.expand(4000, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.softmax(logits / 2.0, -1)
    assert float((shares - expected).abs().max()) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("kind", ["backbone", "gated"])
def test_a_response_is_what_plain_decoding_of_its_own_noise_gives(kind, request):
    """The slow way: one row at a time, with a pass over the whole text for each token."""
    model, tokenizer = request.getfixturevalue(kind)
    found = sampling.sample(model, tokenizer, PROMPTS, range(2), 6, temperature=0.7, seed=5)
    ends = {model.generation_config.eos_token_id}
    for (i, text), number in itertools.product(enumerate(PROMPTS), range(2)):
        noise = sampling.RowNoise([sampling.row_seed(5, text, number)], 0.7, model.device)
        ids, mask = sampling.encode_prompts([text], tokenizer)
        assert bool(mask.all())
        start = ids.shape[1]
        for _ in range(6):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, -1]
            ids = torch.cat((ids, noise(None, logits).argmax(-1, keepdim=True)), 1)
            if int(ids[0, -1]) in ends:
                break
        expected = sampling.response(ids[0, start:].tolist(), tokenizer, list(ends))
        assert found[i][number] == expected


def test_a_response_ends_where_the_model_ends_or_speaks_for_the_human(backbone):
    _, tokenizer = backbone
    eos = tokenizer.eos_token_id
    code = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    cut = sampling.response(code(" Yes, you"), tokenizer, [eos])
    assert cut == sampling.Response("Yes, you", False)
    ended = sampling.response([*code(" Yes."), eos, eos], tokenizer, [eos])
    assert ended == sampling.Response("Yes.", True)
    turn = sampling.response(code(" Yes.\n\nHuman: And"), tokenizer, [eos])
    assert turn == sampling.Response("Yes.", True)


def test_only_a_response_that_ended_trains_with_an_end_token(backbone):
    _, tokenizer = backbone
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "responses": [[{"role": "assistant", "content": text}] for text in ("Yes.", "Yes, you")],
        "scores": [1.0, 0.0],
    }
    eos = tokenizer.eos_token_id
    ended, cut = tokenize_pairs([row | {"ended": [True, False]}], tokenizer)[0][
        "response_input_ids"
    ]
    assert ended[-1] == eos != cut[-1]
    assert [ids[-1] for ids in tokenize_pairs([row], tokenizer)[0]["response_input_ids"]] == [
        eos,
        eos,
    ]


def test_ended_must_be_a_boolean_for_each_response(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2], "ended": [True]}
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="line 1: ended must be 2 booleans"):
        dh.data.load_preference_data(path)


# --- the built-in prompts -------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_questions_in_the_encodings_of_other_programs(tmp_path, encoding, compress):
    """A line ends where a text editor ends it: not at a line separator within a question."""
    text = "What is \u2028 this?\r\n\r\nWas heißt das?\n"
    path = tmp_path / "questions.txt"
    path.write_bytes(compress(text.encode(encoding)))
    found = [prompt[0]["content"] for prompt in load_prompts(str(path))]
    assert found == ["What is \u2028 this?", "Was heißt das?"]


def test_questions_that_are_no_text_are_one_sentence(place, capsys):
    whole = gzip.compress(b"What is this?\n" * 1000)
    for data, words in (
        ("Was heißt das?".encode("latin-1"), "questions.txt: not UTF-8"),
        (whole[:-9], "questions.txt: cannot be read"),
        (b"PK\x03\x04", "a zip archive: unpack it first"),
    ):
        (place / "questions.txt").write_bytes(data)
        assert run(*command()) == 2
        error = capsys.readouterr().err
        assert error.startswith("dualhead sample: --prompts: ") and words in error, error
        assert error.count("\n") == 1


def test_a_scorer_that_fails_is_one_sentence(place, capsys):
    (place / "rule.py").write_text(
        "def fails(prompt, response):\n    return response[10**6]\n"
        "def nothing(prompt, response):\n    pass\n"
        "def nan(prompt, response):\n    return float('nan')\n"
    )
    sys.modules.pop("rule", None)
    for name, words in (
        ("fails", "rule:fails: IndexError: string index out of range"),
        ("nothing", "rule:nothing: TypeError"),
        ("nan", "rule:nan: expected 3 finite numbers"),
    ):
        assert run(*command("--scorer", f"rule:{name}")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("dualhead sample: --scorer: scorer ") and words in error, error
    sys.modules.pop("rule", None)


def test_splits_of_the_open_prompts_share_no_prompt_and_no_topic():
    texts = {split: open_prompts(split) for split in SPLITS}
    assert {split: len(found) for split, found in texts.items()} == {
        "train": 208, "calibration": 64, "measure": 208,
    }  # fmt: skip
    from dualhead_ext.eval.open_prompts import _parts

    topics = {
        split: {t for t in _parts()[1] if any(t in prompt for prompt in found)}
        for split, found in texts.items()
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not set(texts[a]) & set(texts[b])
        assert not topics[a] & topics[b]
    for found in texts.values():
        assert len(set(found)) == len(found)
    assert open_prompts("measure") == texts["measure"]
