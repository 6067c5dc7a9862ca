# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: what each command prints and writes, and that a mistake is
one sentence, exit code 2, and no change to any file."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli import commands
from dualhead_ext.cli.options import OPTIONS
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME

COMMAND = [sys.executable, "-m", "dualhead_ext.cli"]
TINY = ["--max-steps", "2", "--batch-size", "2", "--accumulate", "1", "--max-length", "64"]
TINY += ["--preset", "paper"]
PROMPT = "How do I bake bread?"


def run(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as stop:  # argparse
        return stop.code


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads that `dualhead train` has written, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "heads"
    done = subprocess.run(
        [*COMMAND, "train", "--output", str(folder), "--limit", "6", *TINY,
         "--eval-data", str(write_pairs(folder.parent / "test.jsonl", 4))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder.parent / "out.txt").write_text(done.stdout)
    return folder


def write_pairs(path: Path, count: int) -> Path:
    rows = dh.data.load_preference_data("embedded", "test")[:count]
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path


# --- help and info --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *OPTIONS])
def test_help_shows_examples(command, capsys):
    assert run(*([command] if command else []), "--help") == 0
    out = capsys.readouterr().out
    assert "examples:" in out and f"dualhead {command or 'demo'}" in out
    if command == "train":
        assert "margin (default 1.0)" in " ".join(out.split())  # beta_r's, of the default preset


def test_help_of_every_command_imports_nothing_heavy():
    """What makes help slow is what it imports: torch alone takes seconds."""
    code = """
import contextlib, io, sys
from dualhead_ext import cli
from dualhead_ext.cli.options import OPTIONS
for words in ([], *([name] for name in OPTIONS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main([*words, "--help"])
heavy = "torch transformers numpy rich tqdm yaml matplotlib shtab datasets"
print([name for name in heavy.split() if name in sys.modules], len(sys.modules) < 400)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


MISTYPED = [
    ["generate", "./none", "hi"],
    ["chat", "./none"],
    ["inspect", "./none", "--text", "hi"],
    ["eval", "./none", "--data", "x.jsonl", "--out", "out"],
    ["info", "./none"],
    ["generate", ".", "hi", "--backbone", "./none.gguf"],
    ["chat", ".", "--backbone", "./none"],
    ["sample", "--backbone", "./none", "--prompts", "open", "--scorer", "words", "--out", "x"],
    ["train", "--backbone", "./none", "--output", "out"],
    ["train", "--data", "./none.jsonl", "--output", "out"],
    ["train", "--config", "none.yaml"],
    ["bench", "--report", "none.json"],
]


def test_a_mistyped_path_is_found_before_anything_heavy(tmp_path):
    code = f"""
import sys
from dualhead_ext import cli
codes = [cli.main(argv) for argv in {MISTYPED!r}]
print(set(codes), [name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "{2} []", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(MISTYPED) and all("none" in line for line in lines)
    assert not list(tmp_path.iterdir())


COMPLETIONS = {  # words, the last one half typed -> some of what may follow
    ("tr",): {"train"},
    ("train", "--gate-l"): {"--gate-learning-rate"},
    ("train", "--preset", ""): {"default", "paper"},
    ("train", "--config", "ru"): {"run.yaml"},
    ("generate", "hea"): {"heads"},
    ("completion", ""): {"bash", "zsh", "tcsh"},
}


def test_bash_completes(tmp_path, capsys, monkeypatch):
    assert run("completion", "bash") == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "run.yaml").touch()
    (tmp_path / "heads").mkdir()
    for words, expected in COMPLETIONS.items():
        line = ["dualhead", *words]
        command = f"""
source ./script
COMP_WORDS=({" ".join(map(shlex.quote, line))}) COMP_CWORD={len(words)}
_shtab_dualhead
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert expected <= {word.strip().rstrip("/") for word in done.stdout.split("\n")}, words
    for shell in ("zsh", "tcsh"):
        assert run("completion", shell) == 0
        assert "preset" in capsys.readouterr().out


def test_completion_names_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == 2
    assert "pip install 'dualhead_ext[completion]'" in capsys.readouterr().err


def test_info_says_what_was_built(capsys):
    assert run("info", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.items() >= dh.build_info().items()
    assert report["packages"]["transformers"]
    assert run("info") == 0
    text = capsys.readouterr().out
    assert dh.build_info()["commit"] in text
    assert all(name in text for name in report if name != "packages")


def test_info_describes_heads(heads, quantized_heads, capsys):
    assert run("info", str(heads), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"backbone": "embedded", "quantized": None, "hidden_size": 256, "gate": "attention"}
    assert report.items() >= expected.items()
    assert run("info", str(quantized_heads)) == 0
    assert re.search(r"quantized +int4\n", capsys.readouterr().out)


# --- train and generate ---------------------------------------------------------------------------


def test_train_measures_saves_and_says_how_to_go_on(heads):
    out = (heads.parent / "out.txt").read_text()
    assert "6 pairs to train on, 4 held out" in out
    for line in ("before", "after"):
        assert f"{line} " in out and "of 4 pairs (95 % interval" in out
    assert "always the longer one" in out
    assert f"dualhead generate {heads}" in out
    weights = load_file(heads / WEIGHTS_NAME)
    assert {"reward_head.weight", "gate.out.weight"} <= weights.keys()
    assert weights["gate.out.weight"].abs().max() > 0  # it starts as zero: training moved it


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


def test_resume_goes_on_from_the_last_checkpoint(tmp_path, capsys):
    out = tmp_path / "heads"
    argv = ["train", "--output", str(out), "--limit", "6", "--eval-share", "0", *TINY]
    assert run(*argv, "--save-steps", "1") == 0
    assert run(*argv) == 2
    assert "expected an empty or new folder" in capsys.readouterr().err
    assert run(*argv, "--max-steps", "3", "--resume") == 0
    assert (out / "checkpoint-3").is_dir() or (out / "checkpoint-2").is_dir()
    assert run(*argv, "--overwrite") == 0


def test_hidden_states_are_computed_once(tmp_path, capsys, monkeypatch):
    out, cache = tmp_path / "heads", tmp_path / "cache"
    argv = ["train", "--output", str(out), "--limit", "6", *TINY, "--overwrite"]
    argv += ["--eval-data", str(write_pairs(tmp_path / "test.jsonl", 4))]
    assert run(*argv) == 0
    expected = load_file(out / WEIGHTS_NAME)
    accuracy = capsys.readouterr().out.split("held-out pairs")[1]
    for lines in (1, 0):
        assert run(*argv, "--cache-hidden", str(cache)) == 0
        printed = capsys.readouterr().out
        assert printed.count(f"{cache}/train: hidden states of 6 rows, ") == lines
        assert printed.count(f"{cache}/eval: hidden states of 4 rows, ") == lines
        assert printed.split("held-out pairs")[1] == accuracy
        got = load_file(out / WEIGHTS_NAME)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    usage = shutil._ntuple_diskusage(10**12, 10**12, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(*argv, "--cache-hidden", str(tmp_path / "new")) == 2
    err = [li for li in capsys.readouterr().err.splitlines() if li.startswith("dualhead")]
    assert len(err) == 1 and err[0].startswith("dualhead train: --cache-hidden: ")
    assert "the disk has 0 bytes left" in err[0] and not (tmp_path / "new").exists()


# --- mistakes -------------------------------------------------------------------------------------

# Options after the command; {heads}, {dir} and {file} are filled in. Words of the sentence.
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
    (["generate", "{heads}", "hi", "--objective-weights", "1,2"], "expected 1 numbers"),
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
    (["train", "--output", "{dir}/new", "--resume"], "expected a whole checkpoint"),
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


def test_traceback_on_request(tmp_path):
    with pytest.raises(cli.UserError, match="expected a folder written by train"):
        run("generate", str(tmp_path / "none"), "hi", "--traceback")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise ValueError("a bug")

    monkeypatch.setitem(commands.COMMANDS, "info", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("info")


# --- signals --------------------------------------------------------------------------------------


def test_ctrl_c_while_it_writes(heads):
    process = subprocess.Popen(
        [*COMMAND, "generate", str(heads), PROMPT, "--max-new-tokens", "900", "--sample",
         "--temperature", "3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.read(1)  # it has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_ctrl_c_while_it_trains(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "train", "--output", str(tmp_path / "heads"), "--max-steps", "1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert b"pairs to train on" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_goes_away(heads):
    process = subprocess.Popen(
        [*COMMAND, "generate", str(heads), PROMPT, "--max-new-tokens", "300", "--sample"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_bench_prints_a_report_of_a_file(tmp_path, capsys):
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu.json"
    assert run("bench", "--report", str(results)) == 0
    assert "| d x V | weights |" in capsys.readouterr().out


def test_threads_are_left_as_they_were(heads, capsys):
    before = torch.get_num_threads()
    assert run("generate", str(heads), PROMPT, "--max-new-tokens", "2") == 0
    assert torch.get_num_threads() == before


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"dualhead_ext {dh.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "word"), [(["trian"], "train"), (["train", "--preset", "papr"], "paper")]
)
def test_a_misspelled_choice_is_answered_by_the_nearest(argv, word, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {word}?\n")


def test_info_shows_the_curve_of_calibrated_heads(tmp_path, capsys):
    """It failed: a curve is a list of lists."""
    path = dh.backbone_path("embedded")
    curve = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.312345]]
    dh.DualHeadForCausalLM.from_backbone(path, kl_curve=curve).save_pretrained(tmp_path)
    assert run("info", str(tmp_path)) == 0
    assert "kl_curve         0: 0, 1: 0.1, 2: 0.312\n" in capsys.readouterr().out
