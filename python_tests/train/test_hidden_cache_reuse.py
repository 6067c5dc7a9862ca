# SPDX-License-Identifier: Apache-2.0
"""Cached hidden states are computed again if they are damaged or out of date."""

import json
import os

import pytest
import torch
from hidden_cache_cases import another_row, another_weight, index_of, names, run
from tiny_models import make_model
from trainer_cases import arguments, history, pairs
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.train import hidden_cache_build
from dualhead_ext.train.hidden_cache_build import open_or_build


def another_setting(model):
    model.config.rope_parameters = {"rope_theta": 5000.0, "rope_type": "default"}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"change": another_weight}, "backbone was "),
        ({"change": another_setting}, "backbone was "),
        ({"data": another_row()}, "rows was "),
        ({"data": pairs(15)}, "rows was "),
        ({"max_length": 100}, "max_length was 512, is 100"),
        ({"cache_hidden_dtype": "bfloat16"}, "cache_hidden_dtype was auto, is bfloat16"),
        ({"bf16": True}, "mixed_precision was no, is bf16"),
    ],
)
def test_what_has_changed_is_computed_again(tmp_path, capsys, changes, why):
    run(tmp_path, tmp_path / "cache")
    out = capsys.readouterr().out
    assert f"{tmp_path}/cache/train: hidden states of 14 rows, " in out and "rebuilt" not in out
    changes, model = dict(changes), make_model("llama")
    changes.pop("change", lambda model: None)(model)
    _, calls = run(tmp_path, tmp_path / "cache", model, **changes)
    lines = [li for li in capsys.readouterr().out.splitlines() if "/cache/train: rebuilt" in li]
    assert len(lines) == 1 and f"because {why}" in lines[0] and calls >= 8
    _, calls = run(tmp_path, tmp_path / "cache", model, **changes)
    assert calls == 0 and "rebuilt" not in capsys.readouterr().out
    index = index_of(tmp_path / "cache" / "train")
    assert names(tmp_path / "cache" / "train") == [
        *(s["name"] for s in index["shards"]),
        "index.json",
    ]


def test_a_shorter_text_is_computed_again(tmp_path, capsys):
    """With another max_length, if the trainer tokenises the texts."""
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    rows = dh.data.load_preference_data("embedded")[:3]
    for length, lines in ((64, 1), (64, 0), (48, 1)):
        model = dh.DualHeadForCausalLM.from_backbone(
            str(dh.data.embedded_backbone_path()), reward_head="full", gate="attention"
        )
        args = arguments(tmp_path, cache_hidden=str(tmp_path / "c"), max_length=length)
        trainer = dh.DualHeadTrainer(model, args, None, rows, processing_class=tokenizer)
        trainer.cache_hidden()
        out = capsys.readouterr().out
        assert out.count("/train: ") == lines
    assert "rows was" in out and "max_length was 64, is 48" in out


def test_a_backbone_that_changes_between_two_calls(tmp_path):
    model = make_model("llama")
    trainer, _ = run(tmp_path, tmp_path / "cache", model)
    before = trainer.evaluate()["eval_loss"]
    another_weight(model)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.5)
    after = trainer.evaluate()["eval_loss"]
    trainer.args.cache_hidden = None
    assert after == trainer.evaluate()["eval_loss"] != before


def test_what_does_not_matter_is_not_computed_again(tmp_path):
    run(tmp_path, tmp_path / "cache")
    changes = {"seed": 3, "per_device_train_batch_size": 3, "beta_r": 0.7, "learning_rate": 1e-3}
    other = make_model("llama", gate="linear", mix="probs")
    data = [row | {"objective": 0, "note": "new"} for row in pairs(14)]
    assert run(tmp_path, tmp_path / "cache", other, data, **changes)[1] == 0


def first_shard(folder):
    return sorted(folder.glob("hidden-*"))[0]


def cut(folder):
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 1)


def grown(folder):
    first_shard(folder).write_bytes(first_shard(folder).read_bytes() + b"\0")


def removed(folder):
    first_shard(folder).unlink()


def no_header(folder):
    path = first_shard(folder)
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


def no_index(folder):
    (folder / "index.json").unlink()


def half_an_index(folder):
    path = folder / "index.json"
    path.write_text(path.read_text()[:300])


def edit(folder, change):
    index = index_of(folder)
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def a_deep_index(folder):
    (folder / "index.json").write_text("[" * 100_000)


def a_shard_too_few(folder):
    edit(folder, lambda index: index["shards"].pop())


def a_shard_twice(folder):
    edit(folder, lambda index: index["shards"].append(index["shards"][0]))


def another_shape(folder):
    edit(folder, lambda index: index["shards"][0].update(shape=[1, 32]))


def another_dtype(folder):
    edit(folder, lambda index: index.update(dtype="bfloat16"))


def elsewhere(folder):
    edit(folder, lambda index: index["shards"][0].update(name="../eval/index.json"))


def newer(folder):
    edit(folder, lambda index: index.update(format_version=3))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "bytes, has"),
        (grown, "bytes, has"),
        (removed, "bytes, has none"),
        (no_header, "is damaged"),
        (no_index, "its index is missing"),
        (half_an_index, "its index is damaged"),
        (a_deep_index, "its index is damaged"),
        (a_shard_too_few, "rows are missing"),
        (a_shard_twice, "belongs elsewhere"),
        (another_shape, "another shape or dtype"),
        (another_dtype, "another shape or dtype"),
        (elsewhere, "its index is damaged"),
        (newer, "another format or version"),
    ],
)
def test_damage_is_noticed(tmp_path, capsys, monkeypatch, damage, why):
    monkeypatch.setattr(hidden_cache_build, "SHARD_BYTES", 400)
    lengths = [(2, 3), (1, 1), (4, 2), (3, 3), (5, 2)]
    states = [torch.randn(sum(pair), 8) for pair in lengths]
    computed = []

    def build():
        computed.clear()
        batches, of = (
            [[4, 1], [0, 2]],
            lambda batch: computed.append(batch) or [states[i] for i in batch],
        )
        return open_or_build(tmp_path, {"a": 1}, lengths, batches, of, progress=False)

    build()
    (tmp_path / "notes.txt").write_text("not ours")
    damage(tmp_path)
    capsys.readouterr()
    cache = build()
    assert computed == [[4, 1], [4, 1], [0, 2], [3]]
    assert all(torch.equal(torch.cat(cache[i]), states[i]) for i in range(5))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: rebuilt, because ") and why in line
    kept = [*(s["name"] for s in index_of(tmp_path)["shards"]), "index.json", "notes.txt"]
    assert names(tmp_path) == kept and len(kept) == 4


def test_a_damaged_cache_changes_no_run(tmp_path, capsys):
    expected, _ = run(tmp_path, tmp_path / "cache")
    cut(tmp_path / "cache" / "train")
    trainer, calls = run(tmp_path, tmp_path / "cache")
    assert history(trainer) == history(expected) and calls == 7 + 1
    assert capsys.readouterr().out.count("rebuilt, because hidden-") == 1
