# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: resuming to the bit, refusals, crashes, rotation."""

import json
import os
import random
import shutil

import faults
import numpy as np
import pytest
import torch
from bit_flips import flip
from tiny_models import make_backbone, make_model
from trainer_cases import heads, history, make_trainer, pairs, same

import dualhead_ext as dh
from dualhead_ext.files.checkpoint import CheckpointError, SaveError, latest_checkpoint, verify
from dualhead_ext.files.state_file import load_state
from dualhead_ext.model import pretrained

# 14 pairs, 4 to a step: an epoch is 3 full steps and a smaller one, and 2 epochs are 8 steps.
RUN = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "eval_steps": 3}
RUN |= {"eval_strategy": "steps", "logging_steps": 1}
NO_EVAL = {"eval_strategy": "no"}


def run(folder, resume=None, model=None, data=None, **changes):
    model = make_model("llama") if model is None else model
    trainer = make_trainer(folder, model, data, pairs(5, seed=8), **RUN | changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def copy_of(source, target, *steps):
    for step in steps:
        shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that saves after each of its 8 steps."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = run(folder)
    return folder, heads(trainer.model), history(trainer)


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, whole, step):
    """Every loss, metric, gradient norm, learning rate and weight is the same.

    The run accumulates gradients. The steps are in the middle of an epoch, at its end (4), and
    between evaluations.
    """
    folder, expected, numbers = whole
    trainer = run(copy_of(folder, tmp_path, step), resume=True)
    assert same(expected, heads(trainer.model))
    assert history(trainer) == numbers and len(numbers) >= 11


def test_a_finished_run_takes_no_further_step(tmp_path):
    """transformers' loop would take another step before it notices that the run has ended."""
    options = {"max_steps": 3, "lr_scheduler_type": "constant"}
    expected = run(tmp_path, **options)
    names = sorted(os.listdir(tmp_path))
    trainer = run(tmp_path, resume=True, **options)
    assert trainer.state.global_step == 3 and sorted(os.listdir(tmp_path)) == names
    assert same(heads(expected.model), heads(trainer.model))


def test_saving_does_not_change_a_run(tmp_path, whole):
    trainer = run(tmp_path, save_strategy="no")
    assert same(whole[1], heads(trainer.model)) and history(trainer) == whole[2]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2},
        {"logging_steps": 3},  # the save lies between two logs
        {"bf16": True, "config": {"mix": "probs", "gate": "linear"}},
        {"optim": "sgd", "lr_scheduler_type": "linear", "warmup_steps": 2},
        {"train_lm_head": True},
        {"noise": True},
    ],
)
def test_resumed_is_uninterrupted_in_other_runs(tmp_path, changes):
    changes = dict(changes)
    config, noise = changes.pop("config", {}), changes.pop("noise", False)

    def disturb(module, inputs, output):
        """Noise like that of dropout, from all three generators."""
        draws = torch.rand_like(output[0]) + random.random() + np.random.rand()
        output[0].mul_(0.5 + 0.3 * draws)

    def model():
        made = make_model("llama", **config)
        if noise:
            made.get_decoder().register_forward_hook(disturb)
        return made

    changes |= {"save_steps": 5, "eval_strategy": "no"}
    once = run(tmp_path / "once", model=model(), **changes)
    copy_of(tmp_path / "once", tmp_path / "again", 5)
    again = run(tmp_path / "again", resume=True, model=model(), **changes)
    assert same(heads(once.model), heads(again.model)) and history(once) == history(again)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, whole, caplog):
    """It is reported, and the run still ends with the same bits."""
    folder, expected, _ = whole
    copy_of(folder, tmp_path, 3, 5, 6)
    flip(tmp_path / "checkpoint-6" / "optimizer.safetensors", 2000, 3)
    (tmp_path / "checkpoint-5" / "manifest.json").unlink()
    trainer = run(tmp_path, resume=True)
    assert "checkpoint-6" in caplog.text and "optimizer.safetensors has changed" in caplog.text
    assert "checkpoint-5" in caplog.text and "incomplete" in caplog.text
    assert same(expected, heads(trainer.model))


def test_a_path_is_verified_not_replaced(tmp_path, whole):
    copy_of(whole[0], tmp_path, 3, 6)
    flip(tmp_path / "checkpoint-6" / "dualhead_model.safetensors", 500, 0)
    with pytest.raises(CheckpointError, match=r"dualhead_model\.safetensors has changed"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-6"))
    trainer = run(tmp_path, resume=tmp_path / "checkpoint-3")
    assert same(whole[1], heads(trainer.model))


def refused(tmp_path, whole, error, message, **changes):
    copy_of(whole[0], tmp_path, 3)
    model = changes.get("model") or make_model("llama")
    before = heads(model)
    with pytest.raises(error, match=message):
        run(tmp_path, resume=True, **changes | {"model": model})
    assert all(torch.equal(before[name], p) for name, p in heads(model).items() if name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": pairs(14, seed=1)}, "rows_sha256 was"),
        ({"data": pairs(15)}, "examples was 14, is 15"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2, is 4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps was 2, is 1"),
        ({"seed": 1}, "seed was 42, is 1"),
        ({"data_seed": 5}, "data_seed was 42, is 5"),
    ],
)
def test_other_data_or_order_is_refused(tmp_path, whole, changes, message):
    refused(tmp_path, whole, ValueError, message, **changes)


def test_other_data_is_accepted_when_asked_for(tmp_path, whole):
    copy_of(whole[0], tmp_path, 3)
    run(tmp_path, resume=True, data=pairs(20, seed=1), ignore_data_skip=True)


def test_another_head_or_backbone_is_refused(tmp_path, whole):
    # Its tensors have the same shapes
    other = make_model("llama", gate_num_heads=3, gate_head_dim=4)
    refused(tmp_path / "head", whole, ValueError, "gate_num_heads=2.*gate_num_heads=3", model=other)
    other = make_model("llama", seed=5)
    refused(tmp_path / "backbone", whole, ValueError, "another backbone", model=other)


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        run(tmp_path, resume=True)
    run(tmp_path, save_only_model=True, max_steps=1)
    names = os.listdir(tmp_path / "checkpoint-1")
    assert "optimizer.safetensors" not in names and "dualhead_model.safetensors" in names
    with pytest.raises(CheckpointError, match=r"holds no optimizer.safetensors.*cannot resume"):
        run(tmp_path, resume=True)


def test_transformers_own_checkpoints_are_refused_unread(tmp_path):
    folder = tmp_path / "checkpoint-9"
    folder.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="incomplete or foreign"):
        run(tmp_path, resume=str(folder))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        run(tmp_path, resume=True)


# --- what a checkpoint holds ----------------------------------------------------------------------


def test_a_checkpoint_holds_the_heads_and_no_pickle(whole):
    path = whole[0] / "checkpoint-8"
    assert verify(path) == [
        "README.md",
        "config.json",
        "dualhead_config.json",
        "dualhead_model.safetensors",
        "optimizer.safetensors",
        "progress.safetensors",
        "trainer_state.json",
        "training_args.json",
    ]
    for name in verify(path):
        data = (path / name).read_bytes()
        if name.endswith(".json"):
            json.loads(data)
        elif name == "README.md":
            data.decode()
        else:  # a safetensors file: the length of the header, then the header as JSON
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    trained = sum(t.numel() * t.element_size() for t in whole[1].values())
    assert (path / "dualhead_model.safetensors").stat().st_size < trained + 2000
    assert (path / "optimizer.safetensors").stat().st_size < 2 * trained + 6000
    assert len(load_state(path / "optimizer.safetensors")["optimizer"]["state"]) == 7


def test_a_checkpoint_loads_as_a_model(whole):
    model = dh.DualHeadForCausalLM.from_pretrained(
        whole[0] / "checkpoint-8", backbone=make_backbone("llama")
    )
    state = dict(model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole[1].items())


def test_the_final_model_and_its_tokenizer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert sorted(os.listdir(tmp_path / "final")) == [
        "README.md",
        "config.json",
        "dualhead_config.json",
        "dualhead_model.safetensors",
        "training_args.json",
    ]


# --- rotation and the best ------------------------------------------------------------------------


def steps(folder):
    return sorted(int(name.split("-")[1]) for name in os.listdir(folder) if "checkpoint-" in name)


def test_rotation_keeps_the_newest(tmp_path):
    run(tmp_path, save_total_limit=2, max_steps=5)
    assert steps(tmp_path) == [4, 5]


def test_the_best_is_kept_and_loaded(tmp_path):
    options = {"save_total_limit": 2, "load_best_model_at_end": True, "eval_steps": 1}
    options |= {"metric_for_best_model": "loss", "greater_is_better": False, "learning_rate": 0.5}
    trainer = run(tmp_path, **options)
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert best != 8, "the test needs a run that gets worse again"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert steps(tmp_path) == [best, 8]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_damaged_best_is_not_loaded(tmp_path):
    trainer = run(tmp_path, max_steps=2)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    flip(tmp_path / "checkpoint-1" / "dualhead_model.safetensors", 900, 1)
    with pytest.raises(CheckpointError, match="has changed"):
        trainer._load_best_model()


# --- crashes and full disks -----------------------------------------------------------------------


@pytest.mark.slow
def test_killed_or_out_of_space_at_every_call_of_a_training_checkpoint(tmp_path):
    """With rotation. The last complete checkpoint is the old one or the new one, at every point.

    The next save removes what is left over.
    """
    results = faults.run(
        """
        import json, logging, os, shutil
        from pathlib import Path
        import faults
        from tiny_models import make_model
        from trainer_cases import heads, make_trainer
        from dualhead_ext.files.checkpoint import latest_checkpoint, verify

        logging.disable()
        trainer = make_trainer(".", max_steps=1, save_total_limit=1)
        trainer.train()

        def save(folder, step):
            trainer.args.output_dir, trainer.state.global_step = str(folder), step
            trainer._save_checkpoint(trainer.model, None)

        def check(folder, outcome):
            latest = latest_checkpoint(folder)
            if latest is None or latest.name not in ("checkpoint-1", "checkpoint-2"):
                return f"latest is {latest}"
            if outcome == "done" and latest.name != "checkpoint-2":
                return "not saved"
            if "optimizer.safetensors" not in verify(latest):
                return "not whole"
            save(folder, 3)
            if os.listdir(folder) != ["checkpoint-3"]:
                return f"the next save left {os.listdir(folder)}"

        save(Path("template"), 1)

        def prepare(folder):
            shutil.copytree("template", folder, dirs_exist_ok=True)

        print(json.dumps({
            kind: faults.every_point(kind, prepare, lambda f: save(f, 2), check)
            for kind in ("kill", "full")
        }))
        """,
        tmp_path,
    )
    for result in results.values():
        assert not result["problems"], "\n".join(result["problems"])
        assert result["points"] > 35


def test_training_begins_with_a_trial_save(tmp_path, monkeypatch):
    """An error that would stop the first checkpoint is raised before the first step."""
    trainer = make_trainer(tmp_path, **RUN | NO_EVAL)
    steps = []
    monkeypatch.setattr(type(trainer), "training_step", lambda *a, **k: steps.append(1))
    monkeypatch.setattr(
        pretrained, "fingerprint", lambda model: (_ for _ in ()).throw(IndexError("out of range"))
    )
    with pytest.raises(SaveError, match=r"a trial save in .* failed \(out of range\); nothing has"):
        trainer.train()
    assert not steps and [n for n in os.listdir(tmp_path) if not n.startswith(".lock")] == []


def test_a_trial_save_leaves_nothing_and_needs_no_folder(tmp_path):
    trainer = make_trainer(tmp_path / "deep" / "er", **RUN | NO_EVAL)
    trainer.try_saving()
    assert os.listdir(tmp_path / "deep" / "er") == []
    (tmp_path / "deep" / "er").rmdir()
    (tmp_path / "deep" / "er").write_text("a file in its place")
    again = make_trainer(tmp_path / "other", **RUN | NO_EVAL)
    again.args.output_dir = trainer.args.output_dir
    with pytest.raises(SaveError, match=r"er cannot be written to .*nothing has been trained"):
        again.try_saving()


def test_a_failed_save_says_what_is_safe(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **RUN | NO_EVAL)
    write, written = type(trainer)._write_checkpoint, []

    def fails_at_the_second(self, folder, *state):
        written.append(folder)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return write(self, folder, *state)

    monkeypatch.setattr(type(trainer), "_write_checkpoint", fails_at_the_second)
    with pytest.raises(SaveError) as failure:
        trainer.train()
    assert "checkpoint-2 could not be saved" in str(failure.value)
    assert "No space left on device" in str(failure.value)
    assert f"{tmp_path / 'checkpoint-1'} is whole" in str(failure.value)
    assert latest_checkpoint(tmp_path).name == "checkpoint-1"
