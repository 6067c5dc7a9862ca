# SPDX-License-Identifier: Apache-2.0
"""Cached hidden states give the same losses as no cache, in one process and in several."""

import json
import os
import pickle
import shutil

import pytest
import torch
from hidden_cache_cases import index_of, lengths_of, run
from tiny_models import make_model
from torchrun import run_in_two_processes
from trainer_cases import arguments, heads, history, make_trainer, pairs, same
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data.collate import PreferenceCollator, tokenize_pairs
from dualhead_ext.train.hidden_cache import CachedRows, HiddenCache, UnusableCacheError


@pytest.mark.quick_cases(3)
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
    """The first run has one epoch, in the batches of the cached states. A second run reads the
    cache.
    """
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
    """The rounding of this backbone is coarse, and differs from batch to batch.

    States cached pair by pair give other losses. States cached in the batches of the first epoch
    give the same losses.
    """

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
    """In three epochs: 14 pairs in batches of 2, and 7 held-out pairs in batches of 4.

    Each of the two caches runs one more batch, to know its size.
    """
    _, calls = run(tmp_path, tmp_path / "cache", num_train_epochs=3)
    assert calls == 7 + 2 + 2


def test_other_batches_differ_by_the_backbones_rounding(tmp_path):
    """Cached pair by pair and read in batches of 5, they are as close to float64 as without a
    cache.
    """
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
    """With the same cache, and with a cache that the resumed run must build again."""
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
    """A user's own collator."""

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


def test_rows_travel_to_spawned_workers(tmp_path):
    run(tmp_path, tmp_path / "cache")
    data, folder = pairs(14), tmp_path / "cache" / "train"
    lengths = lengths_of(data)
    rows = CachedRows(data)
    rows.cache = HiddenCache(folder, index_of(folder)["identity"], lengths)
    sent = pickle.dumps(rows)
    assert len(sent) < 20_000  # the worker maps the files and does not receive them
    for row in range(14):
        ours, theirs = rows[row]["hidden_states"][0], pickle.loads(sent)[row]["hidden_states"][0]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert tuple(map(len, ours)) == lengths[row]
    with pytest.raises(UnusableCacheError, match="another was None, is 1"):
        HiddenCache(folder, {"another": 1}, lengths)


@pytest.mark.slow
def test_two_processes_share_one_cache(tmp_path):
    """Each process computes its own batches, with the results of a run without a cache.

    If one process fails, the other fails too, and no files remain.
    """
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
