# SPDX-License-Identifier: Apache-2.0
"""Cached hidden states: the same losses, a stale or damaged cache is built anew, crashes."""

import json
import os
import pickle
import shutil
import threading

import faults
import pytest
import torch
from tiny_models import make_model
from torchrun import run_in_two_processes
from trainer_cases import arguments, heads, history, make_trainer, pairs, same
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data.collate import PreferenceCollator, texts_of, tokenize_pairs
from dualhead_ext.train import hidden_cache_build
from dualhead_ext.train.hidden_cache import CachedRows, HiddenCache, UnusableCacheError
from dualhead_ext.train.hidden_cache_build import open_or_build

RUN = {"eval_strategy": "steps", "eval_steps": 2}


def run(folder, cache=None, model=None, data=None, held_out=None, resume=None, **changes):
    """(trainer, how often the backbone ran)."""
    model = make_model("llama") if model is None else model
    held_out = pairs(7, seed=8) if held_out is None else held_out
    if cache is not None:
        changes["cache_hidden"] = str(cache)
    trainer = make_trainer(folder, model, data, held_out, **RUN | changes)
    calls = []
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    return trainer, len(calls)


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def lengths_of(rows):
    return [tuple(len(tokens) for tokens, _ in texts_of(row)) for row in rows]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(hidden_cache_build, "SHARD_BYTES", 5000)


# --- the same run ---------------------------------------------------------------------------------


def bf16_llama():
    return make_model("llama").bfloat16()


@pytest.mark.parametrize(
    ("make", "changes", "dtype"),
    [
        (make_model, {}, "float32"),
        (make_model, {"dataloader_num_workers": 2}, "float32"),
        (make_model, {"dataloader_drop_last": True, "gradient_accumulation_steps": 3}, "float32"),
        (make_model, {"accelerator_config": {"use_seedable_sampler": False}}, "float32"),
        (make_model, {"bf16": True}, "float32"),
        (make_model, {"padding_free": True}, "float32"),
        (make_model, {"train_lm_head": True, "group": ("llama", {"mix": "probs"})}, "float32"),
        (make_model, {"group": ("gpt2", {"gate": "linear"})}, "float32"),
        (make_model, {"group": ("mistral-sliding", {"gate": "fixed"})}, "float32"),
        (lambda family: make_model(family).bfloat16(), {"bf16": True}, "bfloat16"),
    ],
)
def test_every_number_keeps_its_bits(tmp_path, small_shards, make, changes, dtype):
    """One epoch: its batches are those in which the states were computed. Then from the cache."""
    changes = dict(changes)
    family, config = changes.pop("group", ("llama", {}))
    plain, _ = run(tmp_path, None, make(family, **config), **changes)
    cached, _ = run(tmp_path, tmp_path / "cache", make(family, **config), **changes)
    again, calls = run(tmp_path, tmp_path / "cache", make(family, **config), **changes)
    assert history(plain) == history(cached) == history(again)
    assert same(heads(plain.model), heads(cached.model))
    assert same(heads(plain.model), heads(again.model))
    assert calls == 0
    index = index_of(tmp_path / "cache" / "train")
    assert index["dtype"] == index["computed_dtype"] == dtype
    assert len(index["shards"]) > 1


def test_the_first_epochs_batches_are_those_that_are_cached(tmp_path):
    """With a backbone whose rounding is coarse, and another in each batch: cached pair by pair it
    gives other numbers, cached in these batches it does not."""

    def coarse(module, args, kwargs, output):
        output[0].mul_(1 + 2.0**-8 * (kwargs["input_ids"].sum() % 61))

    runs = {}
    for name, size in (("plain", 2), ("alone", 1), ("alone", 2), ("batches", 2)):
        model = make_model("llama")
        model.get_decoder().register_forward_hook(coarse, with_kwargs=True)
        cache = None if name == "plain" else tmp_path / name
        held_out = pairs(7, seed=8)
        options = {"per_device_train_batch_size": size, "per_device_eval_batch_size": size + 1}
        runs[name] = history(run(tmp_path, cache, model, pairs(15), held_out, **options)[0])
    assert runs["batches"] == runs["plain"] != runs["alone"]


def test_the_backbone_runs_once_over_each_row(tmp_path):
    """Three epochs: 14 pairs in batches of 2 and 7 held-out ones in batches of 4, and once more to
    know the size of each."""
    _, calls = run(tmp_path, tmp_path / "cache", num_train_epochs=3)
    assert calls == 7 + 2 + 2


def test_other_batches_differ_by_the_backbones_rounding(tmp_path):
    """Cached one pair at a time, read in batches of 5: as far from float64 as without a cache."""
    path = str(dh.data.embedded_backbone_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = tokenize_pairs(dh.data.load_preference_data("embedded")[:5], tokenizer, 100)
    model, calls = (
        dh.DualHeadForCausalLM.from_backbone(
            path, dtype=torch.float32, reward_head="full", gate="attention"
        ),
        [],
    )
    hook = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    options = {"cache_hidden": str(tmp_path / "cache")}
    for size in (1, 5):
        trainer = make_trainer(tmp_path, model, rows, per_device_train_batch_size=size, **options)
        trainer.cache_hidden()
    assert len(calls) == 1 + 5
    hook.remove()
    index = index_of(tmp_path / "cache" / "train")
    cache = HiddenCache(tmp_path / "cache" / "train", index["identity"], lengths_of(rows))
    cached = torch.cat([cache[row][side] for side in (0, 1) for row in range(5)])
    batch = PreferenceCollator(0)(rows)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        in_batch = model.training_hidden_states(**batch)[mask]
        exact = model.double().training_hidden_states(**batch)[mask]
    assert (cached - exact).abs().max() <= 2 * (in_batch - exact).abs().max()


def test_bfloat16_on_request_halves_the_size(tmp_path):
    plain, _ = run(tmp_path, tmp_path / "full")
    halved, _ = run(tmp_path, tmp_path / "half", cache_hidden_dtype="bfloat16")
    index = index_of(tmp_path / "half" / "train")
    assert (index["dtype"], index["computed_dtype"]) == ("bfloat16", "float32")
    sizes = [
        sum(s["size"] for s in index_of(tmp_path / f / "train")["shards"]) for f in ("full", "half")
    ]
    assert sizes[1] < 0.55 * sizes[0]
    for ours, theirs in zip(halved.state.log_history[:2], plain.state.log_history[:2], strict=True):
        assert ours["loss"] != theirs["loss"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-7)


@pytest.mark.parametrize("keep", [True, False])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, keep):
    """With the cache at hand, and with one that the resumed run has to build again."""
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole, _ = run(tmp_path / "whole", tmp_path / "cache", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    cache = tmp_path / ("cache" if keep else "new")
    again, calls = run(tmp_path / "again", cache, resume=True, **options)
    assert same(heads(whole.model), heads(again.model)) and history(whole) == history(again)
    assert (calls == 0) == keep


def test_several_evaluation_sets_and_one_that_is_not_cached(tmp_path):
    held_out = {"seen/..": pairs(5), "unseen": pairs(7, seed=8)}
    trainer, _ = run(tmp_path, tmp_path / "cache", held_out=held_out)
    assert sorted(os.listdir(tmp_path / "cache")) == ["eval-seen%2F..", "eval-unseen", "train"]
    plain, _ = run(tmp_path, held_out=held_out)
    assert history(trainer) == history(plain)
    got, want = (t.evaluate(pairs(3, seed=4))["eval_loss"] for t in (trainer, plain))
    assert got == want and len(os.listdir(tmp_path / "cache")) == 3


class LeftPadded(PreferenceCollator):
    """A collator of a user's own."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        shift = [int((row == 0).sum()) for row in batch["attention_mask"]]
        for name in ("input_ids", "attention_mask", "completion_mask"):
            rolled = [row.roll(n) for row, n in zip(batch[name], shift, strict=True)]
            batch[name] = torch.stack(rolled)
        return batch


def test_a_users_own_collator(tmp_path):
    runs = []
    for cache in ({}, {"cache_hidden": str(tmp_path / "cache")}):
        model = make_model("llama")
        args = arguments(tmp_path, **cache)
        trainer = dh.DualHeadTrainer(model, args, LeftPadded(0), train_dataset=pairs(14))
        trainer.train()
        runs.append(history(trainer))
    assert runs[0] == runs[1]
    collator = index_of(tmp_path / "cache" / "train")["identity"]["collator"]
    assert collator == "LeftPadded(pad_to_multiple_of=1, pad_token_id=0, padding_free=False)"


def test_a_collator_that_cuts_is_refused(tmp_path):
    def cut(rows):
        return {k: v[:, :6] if v.dim() == 2 else v for k, v in PreferenceCollator(0)(rows).items()}

    args = arguments(tmp_path, cache_hidden=str(tmp_path / "cache"))
    trainer = dh.DualHeadTrainer(make_model("llama"), args, cut, train_dataset=pairs(14))
    with pytest.raises(
        ValueError, match=r"2 rows have \d+ tokens, the collator's batch of them 2\d"
    ):
        trainer.train()
    assert not (tmp_path / "cache").exists()


# --- stale and damaged ----------------------------------------------------------------------------


def another_weight(model):
    with torch.no_grad():  # one number, by one unit in the last place
        weight = model.get_decoder().layers[0].mlp.up_proj.weight[3, 5]
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))


def another_setting(model):
    model.config.rope_parameters = {"rope_theta": 5000.0, "rope_type": "default"}


def another_row():
    data = pairs(14)
    data[11]["rejected_ids"][0] += 1
    return data


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
    """max_length where the text is tokenised here."""
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


# --- the disk -------------------------------------------------------------------------------------


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    run(tmp_path, tmp_path / "cache")
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 2000, 2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"new/train: the hidden states need 2\d\.\d kB, the disk has 2 kB"
    ):
        run(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="the hidden states need"):
        run(tmp_path, tmp_path / "cache", data=pairs(60))
    assert {p: p.read_bytes() for p in before} == before
    run(tmp_path, tmp_path / "cache", data=another_row())  # in the place of the old one


def test_the_announced_size_is_enough_and_not_far_off(tmp_path, capsys, small_shards):
    run(tmp_path, tmp_path / "cache")
    line = next(li for li in capsys.readouterr().out.splitlines() if "/train: hidden" in li)
    shown, unit = line.split(", ")[1].split()[:2]
    size = sum(p.stat().st_size for p in (tmp_path / "cache" / "train").iterdir())
    assert unit == "kB" and size / 1000 <= float(shown) <= 1.3 * size / 1000


def test_another_run_waits_for_the_one_that_builds(tmp_path):
    """And reads what that one has built."""
    import fcntl

    run(tmp_path, tmp_path / "cache")
    index = (tmp_path / "cache" / "train" / "index.json").read_bytes()
    (tmp_path / "cache" / "train" / "index.json").unlink()
    calls = []
    with open(tmp_path / "cache" / "train" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: calls.append(run(tmp_path, tmp_path / "cache")[1]))
        other.start()
        other.join(1.5)
        assert other.is_alive() and not (tmp_path / "cache" / "train" / "index.json").exists()
        (tmp_path / "cache" / "train" / "index.json").write_bytes(index)
    other.join(60)
    assert calls == [1]  # it had measured the size


def test_killed_out_of_space_or_broken_at_every_call_of_a_build(tmp_path):
    """Over nothing and over a stale cache: there is never what is taken for a whole one but is not,
    and the next build leaves its own files alone."""
    results = faults.run(
        """
        import builtins, contextlib, io, json, os
        import torch
        import faults
        from dualhead_ext.train import hidden_cache_build
        from dualhead_ext.train.hidden_cache import HiddenCache, UnusableCacheError
        from dualhead_ext.train.hidden_cache_build import open_or_build

        hidden_cache_build.SHARD_BYTES = 400
        lengths = [(2, 3), (1, 1), (4, 2), (3, 3), (5, 2)]
        states = {
            kind: [torch.randn(sum(pair), 8) for pair in lengths] for kind in ("old", "new")
        }

        def build(folder, kind="new"):
            with contextlib.redirect_stdout(io.StringIO()):
                open_or_build(
                    folder / "train", {"kind": kind}, lengths, [[4, 1], [0, 2]],
                    lambda batch: [states[kind][row] for row in batch], progress=False,
                )

        def whole(folder, kind="new"):
            try:
                cache = HiddenCache(folder / "train", {"kind": kind}, lengths)
            except UnusableCacheError:
                return False
            for row, expected in enumerate(states[kind]):
                assert torch.equal(torch.cat(cache[row]), expected), "wrong states"
            return True

        def check(folder, outcome):
            done, old = whole(folder), whole(folder, "old")
            if done and old:
                return "old and new"
            if outcome == "done" and not done:
                return "not built"
            if outcome.startswith("OSError") and not shards(folder) <= before(folder):
                return "a failed build left its files"
            if outcome not in ("done", "killed") and not outcome.startswith("OSError"):
                return "another error"
            build(folder)
            left = {name for name in os.listdir(folder / "train")} - {".lock", "index.json"}
            listed = json.loads((folder / "train" / "index.json").read_text())["shards"]
            if not whole(folder) or left != {shard["name"] for shard in listed}:
                return f"the next build left {left}"

        def shards(folder):
            return {path.name for path in folder.glob("train/hidden-*")}

        def before(folder):
            return set(json.loads((folder / "before.json").read_text()))

        def fresh(folder):
            (folder / "before.json").write_text(json.dumps([]))

        def stale(folder):
            build(folder, "old")
            (folder / "before.json").write_text(json.dumps([*shards(folder)]))

        print(json.dumps({
            f"{kind} {prepare.__name__}": faults.every_point(kind, prepare, build, check)
            for kind, prepare in (("kill", fresh), ("kill", stale), ("full", stale))
        }))
        """,
        tmp_path,
    )
    for result in results.values():
        assert not result["problems"], "\n".join(result["problems"])
        assert result["points"] >= 12


# --- reading and processes ------------------------------------------------------------------------


def test_rows_travel_to_spawned_workers(tmp_path):
    run(tmp_path, tmp_path / "cache")
    data, folder = pairs(14), tmp_path / "cache" / "train"
    lengths = lengths_of(data)
    rows = CachedRows(data)
    rows.cache = HiddenCache(folder, index_of(folder)["identity"], lengths)
    sent = pickle.dumps(rows)
    assert len(sent) < 20_000  # the files are mapped there, not sent
    for row in range(14):
        ours, theirs = rows[row]["hidden_states"][0], pickle.loads(sent)[row]["hidden_states"][0]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert tuple(map(len, ours)) == lengths[row]
    with pytest.raises(UnusableCacheError, match="another was None, is 1"):
        HiddenCache(folder, {"another": 1}, lengths)


@pytest.mark.slow
def test_two_processes_share_one_cache(tmp_path):
    """Each computes its own batches; the numbers are those without a cache; a failure of one is a
    failure of both, and nothing stays."""
    run_in_two_processes("ddp_hidden_cache.py", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {
        "equal": [True, True],
        "calls": [[5 + 2, 4 + 1], [0, 0]],
        "problems": [
            "process 1 has a problem",
            f"DualHeadTrainer: caching hidden states in {tmp_path}/broken/train failed on another "
            "process: process 1 has a problem",
        ],
        "left": [],
    }
