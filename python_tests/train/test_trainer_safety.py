# SPDX-License-Identifier: Apache-2.0
"""What protects the work of a run: one run per folder, complete checkpoints, hashes of cached
states.

Errors are raised before training.
"""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from command_line import TINY
from tiny_models import make_model
from trainer_cases import make_trainer, pairs

from dualhead_ext import cli
from dualhead_ext.files import checkpoint
from dualhead_ext.files.atomic import BusyFolderError, locked
from dualhead_ext.files.checkpoint import CheckpointError, SaveError
from dualhead_ext.train.hidden_cache import HiddenCache, UnusableCacheError, rows_identity

SAVE = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


# --- one run per folder ---------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    """While another process holds the lock, its staging folder is not touched."""
    staging = tmp_path / ".checkpoint-1.staging"
    staging.mkdir()
    source = (
        "import sys; from pathlib import Path; from dualhead_ext.files.atomic import locked\n"
        "with locked(Path(sys.argv[1]), wait=False): print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        trainer = make_trainer(tmp_path, **SAVE)
        with pytest.raises(BusyFolderError, match="another run is writing to this folder"):
            trainer.train()
        assert staging.is_dir() and trainer.state.global_step == 0
    finally:
        other.communicate("\n", timeout=60)
    trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and not staging.exists()


def test_the_lock_ends_with_the_run(tmp_path):
    make_trainer(tmp_path, **SAVE).train()
    with locked(tmp_path, wait=False), pytest.raises(BusyFolderError):
        with locked(tmp_path, wait=False):
            pass
    broken = make_trainer(tmp_path, **SAVE)
    broken.compute_loss = None
    with pytest.raises(TypeError):
        broken.train()
    with locked(tmp_path, wait=False):
        pass


def test_a_trial_save_leaves_the_folder_of_another_run_alone(tmp_path):
    """The command tries to save long before it trains."""
    staging = tmp_path / ".checkpoint-1.staging"
    staging.mkdir()
    trainer = make_trainer(tmp_path, **SAVE)
    with locked(tmp_path, wait=False), pytest.raises(BusyFolderError):
        trainer.try_saving()
    assert staging.is_dir()


def test_a_lock_leaves_nothing_behind(tmp_path):
    """Neither its file nor the folders that it made, unless they have been used."""
    folder = tmp_path / "a" / "b"
    with locked(folder):
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), locked(folder):
        (folder / "heads").touch()
        raise ZeroDivisionError
    assert os.listdir(folder) == ["heads"]
    with locked(folder):
        pass
    assert os.listdir(folder) == ["heads"]


def test_who_waits_for_a_lock_gets_the_one_of_the_file_that_is_there(tmp_path):
    """The holder removes the file at its end, while others wait for it."""
    inside, together = [], []

    def work():
        for _ in range(50):
            with locked(tmp_path / "folder"):
                inside.append(1)
                together.append(len(inside))
                time.sleep(1e-4)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == [1] * 200 and not list(tmp_path.glob("folder/*"))


def test_the_command_holds_its_folder_until_the_heads_are_saved(tmp_path, monkeypatch, capsys):
    """From before the trial save; and what another run has written meanwhile is not replaced."""
    from dualhead_ext.cli import train, training_files, training_summary

    words = ["train", *TINY, "--limit", "4", "--output", str(tmp_path / "heads")]
    held = []

    def try_to_lock(*arguments):
        with pytest.raises(BusyFolderError), locked(tmp_path / "heads", wait=False):
            pass
        held.append(1)
        return ""

    monkeypatch.setattr(training_summary, "sample_before_and_after", try_to_lock)
    monkeypatch.setattr(training_files, "write_plot", try_to_lock)
    monkeypatch.setattr(training_summary, "print_replies", lambda replies: None)
    monkeypatch.setattr(training_summary, "warnings_of", lambda *figures: [])
    with locked(tmp_path / "heads", wait=False):
        assert cli.main(words) == 2
    assert "--output" in (said := capsys.readouterr().err) and "another run is writing" in said
    assert not (tmp_path / "heads").exists()
    assert cli.main(words) == 0
    assert held == [1, 1] and ".lock" not in os.listdir(tmp_path / "heads")

    make, other = train._make_trainer, tmp_path / "other"

    def slowly(*given):
        other.mkdir()
        (other / "dualhead_config.json").touch()  # of a run that ends meanwhile
        return make(*given)

    monkeypatch.setattr(train, "_make_trainer", slowly)
    assert cli.main([*words[:-1], str(other)]) == 2
    assert "which holds dualhead_config.json" in capsys.readouterr().err
    assert os.listdir(other) == ["dualhead_config.json"]


def test_an_incomplete_checkpoint_is_not_finished(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint-1: cannot be finished: b, c vanished"):
        with checkpoint.staged(tmp_path, 1, required=("a", "b", "c")) as folder:
            (folder / "a").write_text("x")
    assert not list(tmp_path.iterdir())
    trainer = make_trainer(tmp_path, **SAVE)
    write = trainer._write_checkpoint

    def lose_heads(folder, *state):
        write(folder, *state)
        (folder / "dualhead_model.safetensors").unlink()

    trainer._write_checkpoint = lose_heads
    with pytest.raises(
        SaveError, match=r"dualhead_model\.safetensors vanished.* no whole checkpoint"
    ):
        trainer.train()
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_another_optimizer_does_not_resume(tmp_path):
    make_trainer(tmp_path, **SAVE).train()
    trainer = make_trainer(tmp_path, **SAVE | {"max_steps": 4, "optim": "sgd"})
    with pytest.raises(ValueError, match=r"checkpoint-2: was written with another optimizer"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step <= 2


# --- cached hidden states -------------------------------------------------------------------------


def test_a_changed_bit_of_cached_states_is_found(tmp_path):
    rows, cache = pairs(6), tmp_path / "cache"
    make_trainer(tmp_path, data=rows, cache_hidden=str(cache), max_steps=1).train()
    folder = cache / "train"
    index = json.loads((folder / "index.json").read_text())
    (entry,) = index["shards"]
    _, lengths = rows_identity(rows)
    whole = HiddenCache(folder, index["identity"], lengths)
    assert whole[0][0].isfinite().all()
    path = folder / entry["name"]
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40  # a bit in the exponent of the last state
    path.write_bytes(content)
    damaged = HiddenCache(folder, index["identity"], lengths)
    with pytest.raises(UnusableCacheError, match=f"{entry['name']}: has changed since it was"):
        damaged[0]
    trainer = make_trainer(tmp_path, data=rows, cache_hidden=str(cache), max_steps=1)
    with pytest.raises(UnusableCacheError, match=r"remove .*cache/train to"):
        trainer.train()


def test_labels_of_cached_rows_are_checked(tmp_path):
    """With cached states, no embedding is computed, which would otherwise refuse such labels."""
    rows = [*pairs(4), {"prompt_ids": [1], "chosen_ids": [10**6], "rejected_ids": [3]}]
    with pytest.raises(ValueError, match=r"token ids must be below 101.*got 1000000 in row 4"):
        make_trainer(tmp_path, data=rows, cache_hidden=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_evaluating_first_changes_no_dtype(tmp_path):
    model = make_model("llama")
    trainer = make_trainer(tmp_path, model, eval_data=pairs(4), max_steps=1, bf16=True)
    trainer.evaluate()
    trainer.train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# --- the command line -----------------------------------------------------------------------------


def refused(capsys, *argv):
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dualhead")]
    assert code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "./nosuch"], "--backbone: expected a folder or a GGUF file, got ./nosuch"),
        (["--data", "./nosuch.jsonl"], "--data: "),
        (["--seed", str(2**63)], "--seed: expected a whole number in [0, 4294967295]"),
        (["--seed", "-1"], "--seed: expected a whole number in [0, 4294967295]"),
        (["--set", "ddp_static_graph=true"], "ddp_static_graph=True is not supported"),
        (["--device", "cpu", "--set", "bf16_full_eval=true"], "bf16_full_eval=True would leave"),
        (["--report-to", "wandb"], "--report-to: wandb is not installed"),
        (["--set", 'report_to=["wandb"]'], "--report-to: wandb is not installed"),
    ],
)
def test_mistakes_are_noticed_early_and_leave_nothing(options, message, capsys, tmp_path):
    output = tmp_path / "new" / "heads"
    assert message in refused(capsys, "train", "--output", str(output), "--limit", "4", *options)
    assert not (tmp_path / "new").exists()


def test_input_that_is_not_utf8(capsys, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    sentence = refused(capsys, "train", "--output", str(tmp_path / "h"), "--data", str(tmp_path / "a.jsonl"))  # fmt: skip  # noqa: E501
    assert "a.jsonl, after line 0: not UTF-8" in sentence
    heads = tmp_path / "heads"
    heads.mkdir()
    assert "prompt: expected UTF-8 text" in refused(capsys, "generate", str(heads), "a\udce9")
    for words in (("--text", "a\udce9"), ("--text", "a", "--prompt", "a\udce9")):
        sentence = refused(capsys, "inspect", str(heads), *words)
        assert f"{words[-2]}: expected UTF-8 text, got other bytes" in sentence


def test_a_changed_bit_of_cached_states_is_one_sentence(capsys, tmp_path):
    words = ["train", *TINY, "--limit", "4", "--cache-hidden", str(tmp_path / "cache"), "--output"]
    assert cli.main([*words, str(tmp_path / "a")]) == 0
    path = next((tmp_path / "cache" / "train").glob("hidden-*"))
    content = bytearray(path.read_bytes())
    content[-7] ^= 0x40
    path.write_bytes(content)
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err  # behind a progress bar
    assert f"dualhead train: --cache-hidden: {path}: has changed since" in said


def test_a_folder_that_cannot_be_made_is_named(capsys):
    """/proc is a folder that root may write to, as far as permissions say."""
    sentence = refused(capsys, "train", *TINY, "--limit", "4", "--output", "/proc/heads")
    assert sentence.startswith("dualhead train: --output: ")


def test_missing_extras_are_named(capsys, tmp_path, monkeypatch):
    from dualhead_ext.cli.errors import missing_extra

    assert "dualhead_ext[train]" in missing_extra(ImportError(name="accelerate"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = "Using the `Trainer` with `PyTorch` requires `accelerate>=1.1.0`"
    assert "pip install 'dualhead_ext[train]'" in missing_extra(ImportError(words))
    assert missing_extra(ImportError("cannot import name 'x' from 'y'")) is None
    assert "[hf]" in missing_extra(ImportError(name="transformers"))


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["train", "--output", "{dir}/h"], "train"),
        (["train", "--output", "{dir}/h", "--backbone", "smollm2"], "smollm2"),
        (["demo", "--output", "{dir}/h"], "train"),
        (["eval", "--suite", "paper", "--scale", "tiny", "--out", "{dir}/e"], "train"),
        (["eval", "--suite", "steering", "--out", "{dir}/e"], "steering"),
    ],
)
def test_one_extra_has_all_that_a_command_needs(words, extra, capsys, tmp_path, monkeypatch):
    """Not "hf" first and, after that is installed, another one."""

    def without_transformers(backbone):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    for module in ("train", "commands"):
        monkeypatch.setattr(f"dualhead_ext.cli.{module}.quiet_transformers", without_transformers)
    sentence = refused(capsys, *(word.format(dir=tmp_path) for word in words))
    assert sentence.endswith(f"install it with: pip install 'dualhead_ext[{extra}]'")
    assert not list(tmp_path.iterdir())


def test_the_command_that_train_prints_names_a_backbone_of_ones_own(tmp_path):
    from argparse import Namespace

    from dualhead_ext.cli.train import _generate_command

    mine = Namespace(output="my heads", backbone=str(tmp_path))
    assert _generate_command(mine).endswith(f"--backbone {tmp_path}")
    assert "'my heads'" in _generate_command(mine)
    for name in ("embedded", "someone/model"):
        assert "--backbone" not in _generate_command(Namespace(output="h", backbone=name))
