# SPDX-License-Identifier: Apache-2.0
"""The command line with heads that `dualhead train` has written.

The tests cover what each command prints, and signals. A mistake gives one sentence and exit code 2,
and changes no file.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import COMMAND, TINY, run, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME

PROMPT = "How do I bake bread?"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads that `dualhead train` has written. What it printed is in out.txt beside them."""
    folder = tmp_path_factory.mktemp("cli") / "heads"
    done = subprocess.run(
        [*COMMAND, "train", "--output", str(folder), "--limit", "6", *TINY,
         "--eval-data", str(write_pairs(folder.parent / "test.jsonl", 4))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder.parent / "out.txt").write_text(done.stdout)
    return folder


def test_info_describes_heads(heads, quantized_heads, capsys):
    assert run("info", str(heads), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"backbone": "embedded", "quantized": None, "hidden_size": 256, "gate": "attention"}
    assert report.items() >= expected.items()
    assert run("info", str(quantized_heads)) == 0
    assert re.search(r"quantized +int4\n", capsys.readouterr().out)


def test_info_refuses_damaged_weights(heads, tmp_path, capsys):
    shutil.copytree(heads, tmp_path / "heads")
    weights = tmp_path / "heads" / "dualhead_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert run("info", str(tmp_path / "heads")) == 2
    assert re.search(r"heads: .*dualhead_model\.safetensors is damaged", capsys.readouterr().err)
    weights.unlink()
    assert run("info", str(tmp_path / "heads")) == 2
    assert "holds no dualhead_model.safetensors" in capsys.readouterr().err


def test_train_measures_saves_and_says_how_to_go_on(heads):
    out = (heads.parent / "out.txt").read_text()
    assert "6 pairs to train on, 4 held out" in out
    for line in ("before", "after"):
        assert f"{line} " in out and "of 4 pairs (95 % interval" in out
    assert "always the longer one" in out
    assert f"dualhead generate {heads}" in out
    weights = load_file(heads / WEIGHTS_NAME)
    assert {"reward_head.weight", "gate.out.weight"} <= weights.keys()
    assert weights["gate.out.weight"].abs().max() > 0  # training changed it: it starts as zero


def test_generate_streams_what_the_model_writes(heads, capsys):
    assert run("generate", str(heads), PROMPT, "--max-new-tokens", "12") == 0
    shown = capsys.readouterr().out
    model = dh.DualHeadForCausalLM.from_pretrained(heads)
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    inputs = tokenizer(f"\n\nHuman: {PROMPT}\n\nAssistant:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert shown == tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_strength_zero_max_kl_zero_and_backbone_only_are_the_backbones_text(heads, capsys):
    texts = []
    for option in (["--strength", "0"], ["--max-kl", "0"], ["--backbone-only"]):
        assert run("generate", str(heads), PROMPT, "--max-new-tokens", "12", *option) == 0
        texts.append(capsys.readouterr().out)
    path = dh.data.embedded_backbone_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    backbone = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    inputs = tokenizer(f"\n\nHuman: {PROMPT}\n\nAssistant:", return_tensors="pt")
    ids = backbone.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert texts == [tokenizer.decode(new, skip_special_tokens=True) + "\n"] * 3


@pytest.fixture(scope="module")
def quantized_heads(heads, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    dh.DualHeadForCausalLM.from_pretrained(heads, quantize="int4").save_pretrained(folder)
    return folder


def test_quantized_heads_generate(heads, quantized_heads, capsys):
    texts = []
    for folder, option in ((heads, ("--quantize", "int4")), (quantized_heads, ())):
        assert run("generate", str(folder), PROMPT, "--max-new-tokens", "12", *option) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 12
    for folder in (heads, quantized_heads):
        assert run("generate", str(folder), PROMPT, "--max-new-tokens", "9", "--backbone-only") == 0
        texts.append(capsys.readouterr().out)
    assert texts[2] == texts[3]
    assert run("generate", str(quantized_heads), PROMPT, "--quantize", "int8") == 2
    assert "holds heads in int4, which cannot become int8" in capsys.readouterr().err


def test_show_gate(heads, capsys):
    options = ("generate", str(heads), PROMPT, "--max-new-tokens", "5", "--show-gate")
    assert run(*options, "--alpha", "0.25", "--color", "never") == 0
    plain = capsys.readouterr().out
    assert plain.splitlines()[-1] == "alpha: 0.25 at each of 5 tokens"
    assert plain.count("{0.25}") == 5
    assert run(*options, "--color", "always") == 0
    assert "\x1b[" in capsys.readouterr().out


def test_sampling_repeats_with_its_seed(heads, capsys):
    def text(seed, *options):
        argv = ("generate", str(heads), PROMPT, "--max-new-tokens", "16", *options)
        assert run(*argv, "--seed", str(seed)) == 0
        return capsys.readouterr().out

    first = text(3, "--temperature", "1.2")
    assert text(3, "--temperature", "1.2") == first
    assert text(4, "--temperature", "1.2") != first
    assert text(3, "--top-k", "1") == text(4)  # greedy


def test_prompt_from_standard_input(heads, capsys, monkeypatch):
    assert run("generate", str(heads), PROMPT, "--max-new-tokens", "8") == 0
    expected = capsys.readouterr().out
    done = subprocess.run(
        [*COMMAND, "generate", str(heads), "--max-new-tokens", "8"],
        input=f"{PROMPT}\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == expected


# Options after the command, in which {heads}, {dir} and {file} are filled in, and words of the
# error.
MISTAKES = [
    (["generate", "{dir}/none", "hi"], "expected a folder written by train"),
    (["generate", "{dir}", "hi"], "heads:"),
    (["generate", "{heads}", "hi", "--backbone", "{dir}/none"], "--backbone: expected a folder"),
    (["generate", "{heads}", "hi", "--strength", "-1"], "expected a number of at least 0"),
    (["generate", "{heads}", "hi", "--max-kl", "-1"], "expected a number of at least 0"),
    (["generate", "{heads}", "hi", "--alpha", "1.5"], "expected a number in [0, 1], got '1.5'"),
    (["generate", "{heads}", "hi", "--gate-offset", "nan"], "expected a number, got 'nan'"),
    (["generate", "{heads}", "hi", "--top-k", "x"], "expected a whole number of at least 0"),
    (["generate", "{heads}", "hi", "--objective-weights", "1,x"], "separated by commas"),
    (["generate", "{heads}", "hi", "--objective-weights", "1,2"], "have objectives, 1, got 2"),
    (["generate", "{heads}", "hi", "--max-new-tokens", "5000"], "a context of 1024"),
    (["generate", "{heads}", "  "], "prompt: expected some text"),
    (["generate", "{heads}", "hi", "--backbone-only", "--alpha", "1"], "no option of the gate"),
    (["generate", "{heads}", "hi", "--backbone-only", "--quantize", "int8"], "got --quantize"),
    (["generate", "{heads}", "hi", "--quantize", "int3"], "invalid choice: 'int3'"),
    (["info", "{dir}/none"], "heads: expected a folder written by train"),
    (["info", "{dir}"], "heads:"),
    (["generate", "{heads}", "hi", "--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
    (["generate", "{heads}", "hi", "--device", "cuda:99"], "expected a device that torch"),
    (["generate", "{heads}", "hi", "--colour", "never"], "unrecognized arguments: --colour"),
    (["train"], "required: --output"),
    (["train", "--output", "{file}"], "--output:"),
    (["train", "--output", "{heads}"], "with --overwrite"),
    (["train", "--output", "{dir}/new", "--data", "{dir}/none.jsonl"], "--data:"),
    (["train", "--output", "{dir}/new", "--data", "{file}"], "line 2"),
    (["train", "--output", "{dir}/new", "--eval-data", "{dir}/none.jsonl"], "--eval-data:"),
    (["train", "--output", "{dir}/new", "--backbone", "{dir}/none"], "--backbone: expected"),
    (["train", "--output", "{dir}/new", "--resume"], "expected a complete checkpoint"),
    (["train", "--output", "{dir}/new", "--gate", "open"], "invalid choice: 'open'"),
    (["train", "--output", "{dir}/new", "--limit", "0"], "a whole number of at least 1"),
    (["train", "--output", "{dir}/new", "--set", "beta"], "expected NAME=VALUE"),
    (["train", "--output", "{dir}/new", "--set", "nothing=1"], "expected a field of"),
    (["train", "--output", "{dir}/new", "--beta-r", "-1"], "beta_r"),
    (["train", "--output", "{dir}/new", "--pref-on", "both"], "pref_on"),
    (["train", "--output", "{dir}/new", "--cache-hidden-dtype", "int8"], "cache_hidden_dtype"),
    (["bench", "--report", "{dir}/none.json"], "none.json"),
    (["bench", "--report", "{file}"], "must be JSON"),
    (["bench", "--seconds", "x"], "invalid float value: 'x'"),
    (["demo", "--prompts", "2"], "expected a whole number in [16, 208]"),
    (["fly"], "invalid choice: 'fly'"),
    ([], "required: command"),
]


@pytest.mark.parametrize("argv, words", MISTAKES, ids=[" ".join(a) or "none" for a, _ in MISTAKES])
def test_a_mistake_is_one_sentence(argv, words, heads, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    broken.write_text(f'{json.dumps(row)}\n{{"prompt": \n')
    before = files_of(heads), files_of(tmp_path)
    filled = [part.format(heads=heads, dir=tmp_path, file=broken) for part in argv]
    assert run(*filled) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("dualhead") and words in err, err
    assert "Traceback" not in err and not out
    assert (files_of(heads), files_of(tmp_path)) == before


def damaged(heads, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(heads, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    change(folder)
    return folder


def truncate(folder):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def other_vocabulary(folder):
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    config["dual_head"]["vocab_size"] += 1
    path.write_text(json.dumps(config))


def no_weights(folder):
    (folder / WEIGHTS_NAME).unlink()


@pytest.mark.parametrize("change", [truncate, other_vocabulary, no_weights])
def test_foreign_or_damaged_heads(change, heads, tmp_path, capsys):
    folder = damaged(heads, tmp_path, change)
    assert run("generate", str(folder), "hi") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("dualhead generate: heads"), err


@pytest.mark.slow
def test_ctrl_c_while_it_writes(heads):
    process = subprocess.Popen(
        [*COMMAND, "generate", str(heads), PROMPT, "--max-new-tokens", "900", "--sample",
         "--temperature", "3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.read(1)  # wait until it has started
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.slow
def test_a_reader_that_goes_away(heads):
    process = subprocess.Popen(
        [*COMMAND, "generate", str(heads), PROMPT, "--max-new-tokens", "300", "--sample"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_threads_are_left_as_they_were(heads, capsys):
    before = torch.get_num_threads()
    assert run("generate", str(heads), PROMPT, "--max-new-tokens", "2") == 0
    assert torch.get_num_threads() == before
