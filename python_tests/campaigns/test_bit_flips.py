# SPDX-License-Identifier: Apache-2.0
"""A flipped bit in any file of the package is refused, or changes nothing that is read."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from trainer_cases import make_trainer

from dualhead_ext.files.checkpoint import CheckpointError, latest_checkpoint, verify
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME, read_head_folder
from dualhead_ext.train import hidden_cache_build
from dualhead_ext.train.hidden_cache import HiddenCache, UnusableCacheError

FLIPS = 500


@contextlib.contextmanager
def flipped(path: Path, rng: random.Random) -> Iterator[int]:
    """Flip one random bit of the file; yields its position."""
    whole = path.read_bytes()
    bit = rng.randrange(8 * len(whole))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    yield bit
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("config", "quantized"),
    [
        ({}, None),
        ({}, "int8"),
        ({"reward_head": "embedding", "reward_rank": 3, "num_objectives": 2}, None),
        ({"reward_head": "lowrank", "reward_rank": 3, "gate": "linear"}, None),
    ],
    ids=["full", "int8", "embedding", "lowrank"],
)
def test_heads(tmp_path, seed, config, quantized):
    rng, model = random.Random(seed), make_model("llama", **config)
    if quantized is not None:
        model.quantize(quantized)
    model.save_pretrained(tmp_path)
    stored, state = read_head_folder(tmp_path)
    state = {name: value.clone() for name, value in state.items()}
    refused = 0
    for _ in range(FLIPS // 4):
        name = rng.choice([CONFIG_NAME, CONFIG_NAME, WEIGHTS_NAME])
        with flipped(tmp_path / name, rng) as bit:
            try:
                found, values = read_head_folder(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error), f"{name}, bit {bit}: {error}"
                refused += 1
                continue
            same = values.keys() == state.keys() and all(
                torch.equal(value, state[n]) for n, value in values.items()
            )
            known = {**found, "sha256": None} == {**stored, "sha256": None}
            assert same and known, f"{name}, bit {bit}: read as something else"
    assert refused > FLIPS // 8


def test_checkpoints(tmp_path, seed):
    rng = random.Random(seed)
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    folder = latest_checkpoint(tmp_path)
    files = [folder / name for name in [*verify(folder), "manifest.json"]]
    for _ in range(FLIPS // 4):
        path = rng.choice(files)
        with flipped(path, rng) as bit:
            with pytest.raises(CheckpointError, match=path.name):
                verify(folder)
            passed_over = latest_checkpoint(tmp_path)
            assert passed_over.name == "checkpoint-1", f"{path.name}, bit {bit}: {passed_over}"
    assert latest_checkpoint(tmp_path) == folder


def test_cached_hidden_states(tmp_path, seed, monkeypatch):
    """A bit of a shard or of the index: the cache reads as before, or is reported as unusable."""
    monkeypatch.setattr(hidden_cache_build, "SHARD_BYTES", 400)
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 4), rng.randint(1, 4)) for _ in range(8)]
    states = [torch.randn(sum(pair), 8) for pair in lengths]
    identity, batches = {"a": 1}, [[4, 1], [0, 2]]
    hidden_cache_build.open_or_build(
        tmp_path, identity, lengths, batches, lambda rows: [states[i] for i in rows], progress=False
    )
    files = [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".")]
    refused = 0
    for _ in range(FLIPS):
        path = rng.choice(files)
        with flipped(path, rng) as bit:
            try:
                cache = HiddenCache(tmp_path, identity, lengths)
                rows = [torch.cat(cache[i]) for i in range(len(lengths))]
            except UnusableCacheError:
                refused += 1
                continue
            same = all(torch.equal(row, state) for row, state in zip(rows, states, strict=True))
            assert same and cache.dtype == torch.float32, f"{path.name}, bit {bit}"
    assert refused > FLIPS // 2
