# SPDX-License-Identifier: Apache-2.0
"""The command line without heads: help, completion, info, training."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import COMMAND, TINY, run, write_pairs
from safetensors.torch import load_file

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli import commands
from dualhead_ext.cli.completion import SHELLS
from dualhead_ext.cli.decoding import as_utf8
from dualhead_ext.cli.options import OPTIONS
from dualhead_ext.model.head_folder import WEIGHTS_NAME


@pytest.mark.parametrize("command", [None, *OPTIONS])
def test_help_shows_examples(command, capsys):
    assert run(*([command] if command else []), "--help") == 0
    out = capsys.readouterr().out
    assert "examples:" in out and f"dualhead {command or 'demo'}" in out
    if command == "train":
        # The default of beta_r, in the default preset
        assert "margin (default 1.0)" in " ".join(out.split())


def test_help_of_every_command_imports_nothing_heavy():
    """Help must be fast. Imports are what makes it slow: torch alone takes seconds."""
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


COMPLETIONS = {  # words, of which the last is incomplete -> some of its completions
    ("tr",): {"train"},
    ("train", "--gate-l"): {"--gate-learning-rate"},
    ("train", "--preset", ""): {"default", "paper"},
    ("train", "--config", "ru"): {"run.yaml"},
    ("generate", "hea"): {"heads"},
    ("completion", ""): {"bash", "zsh", "fish", "tcsh"},
}


def _asking_bash(words):
    line = " ".join(map(shlex.quote, ["dualhead", *words]))
    return f"""
source ./script
COMP_WORDS=({line}) COMP_CWORD={len(words)}
_shtab_dualhead
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def _asking_fish(words):
    # fish prints a completion, a tab and its description on each line.
    return f"source ./script; complete -C {shlex.quote(' '.join(['dualhead', *words]))}"


@pytest.mark.parametrize(
    ("shell", "asking"), [(["bash"], _asking_bash), (["fish", "--no-config"], _asking_fish)]
)
def test_a_shell_completes(shell, asking, tmp_path, capsys):
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    assert run("completion", shell[0]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "run.yaml").touch()
    (tmp_path / "heads").mkdir()
    for words, expected in COMPLETIONS.items():
        done = subprocess.run(
            [*shell, "-c", asking(words)], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        shown = {line.split("\t")[0].strip().rstrip("/") for line in done.stdout.split("\n")}
        assert expected <= shown, words


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(shell, capsys):
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


@pytest.mark.slow
def test_resume_goes_on_from_the_last_checkpoint(tmp_path, capsys):
    out = tmp_path / "heads"
    argv = ["train", "--output", str(out), "--limit", "6", "--eval-share", "0", *TINY]
    assert run(*argv, "--save-steps", "1") == 0
    assert run(*argv) == 2
    assert "expected an empty or new folder" in capsys.readouterr().err
    assert run(*argv, "--max-steps", "3", "--resume") == 0
    assert (out / "checkpoint-3").is_dir() or (out / "checkpoint-2").is_dir()
    assert run(*argv, "--overwrite") == 0


@pytest.mark.slow
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


def test_traceback_on_request(tmp_path):
    with pytest.raises(cli.UserError, match="expected a folder written by train"):
        run("generate", str(tmp_path / "none"), "hi", "--traceback")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"\u20ac \udcff"), ("utf-8", "€ \\udcff")]
)
def test_output_that_the_locale_cannot_write(encoding, shown, monkeypatch):
    """A model's text, and names of files that are not text."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setitem(commands.COMMANDS, "info", lambda arguments: print("€ \udcff"))
    assert run("info") == 0
    assert written.getvalue().decode(encoding) == f"{shown}\n"


def test_arguments_under_a_locale_other_than_utf8(monkeypatch):
    """Python decodes them as ASCII; bytes that are not UTF-8 are refused all the same."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    given = "Grüße €".encode().decode("ascii", "surrogateescape")
    assert as_utf8(given) == as_utf8("Grüße €") == "Grüße €"
    for text in (b"\xe9t\xe9".decode("ascii", "surrogateescape"), "\ud800"):
        with pytest.raises(ValueError, match="expected UTF-8 text, got other bytes"):
            as_utf8(text)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise ValueError("a bug")

    monkeypatch.setitem(commands.COMMANDS, "info", broken)
    with pytest.raises(ValueError, match="a bug"):
        run("info")


@pytest.mark.slow
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


def test_bench_prints_a_report_of_a_file(tmp_path, capsys):
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu.json"
    assert run("bench", "--report", str(results)) == 0
    assert "| d x V | weights |" in capsys.readouterr().out


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
    """A regression: a curve is a list of lists, and the command failed on it."""
    path = dh.backbone_path("embedded")
    curve = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.312345]]
    dh.DualHeadForCausalLM.from_backbone(path, kl_curve=curve).save_pretrained(tmp_path)
    assert run("info", str(tmp_path)) == 0
    assert "kl_curve         0: 0, 1: 0.1, 2: 0.312\n" in capsys.readouterr().out
