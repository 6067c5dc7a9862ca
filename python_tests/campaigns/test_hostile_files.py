# SPDX-License-Identifier: Apache-2.0
"""Files with hostile values at random places, and hashes that match them.

Each file loads, or raises one ValueError that names the file, within a second.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import head_forging
import pytest
import torch
from tiny_models import make_backbone, make_model

import dualhead_ext as dh
from dualhead_ext.data import load_preference_data
from dualhead_ext.files import checkpoint
from dualhead_ext.files.state_file import load_state, save_state
from dualhead_ext.model.head_folder import CONFIG_NAME, WEIGHTS_NAME
from dualhead_ext.train.hidden_cache import HiddenCache, UnusableCacheError
from dualhead_ext.train.hidden_cache_build import open_or_build

FILES = 60
RAW = ("1" + "0" * 400, "-" + "9" * 5000, "1e999", "NaN", "-Infinity", "[" * 20000,
       "[" * 3000 + "]" * 3000, '{"a":' * 20000, '{"a": 1, "a": 2}', '"\\ud800"', "")  # fmt: skip
VALUES = (None, True, False, -1, 0, 1, 2**31, 2**63, -(2**64), 0.5, 1e308, -0.0, "", "x" * 10000,
          "../../x", "/dev/zero", "\0", [], {}, [[]], [None], {"": 0}, [0] * 2000, "float32",
          {str(i): i for i in range(3000)})  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all entries inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, entry in inside:
        found.append((*path, key))
        if isinstance(entry, (dict, list)):
            found += places(entry, (*path, key))
    return found


def mutated(value: Any, rng: random.Random) -> tuple[Any, str]:
    """(a copy with one entry changed, the JSON text that replaces its string "RAW")."""
    value = json.loads(json.dumps(value))
    *path, key = rng.choice(places(value))
    parent = value
    for step in path:
        parent = parent[step]
    raw, change = rng.choice(RAW), rng.random()
    if change < 0.15:
        del parent[key]
    elif change < 0.25 and isinstance(parent, dict):
        parent["also"] = rng.choice(VALUES)
    elif change < 0.6:
        parent[key] = "RAW"
    else:
        parent[key] = rng.choice(VALUES)
    return value, raw


def text_of(value: Any, raw: str) -> bytes:
    return json.dumps(value).replace('"RAW"', raw).encode(errors="surrogatepass")


def tried(act: Callable[[], Any], name: str, told: str, error: type = ValueError) -> bool:
    """Whether the file was refused. Any other error, or more than a second, fails the test."""
    started, refusal = time.process_time(), None
    try:
        act()
    except error as raised:
        refusal = raised
    except Exception as raised:
        raise AssertionError(f"{told}: raised {raised!r}") from raised
    assert time.process_time() - started < 1, f"{told}: took more than a second"
    if refusal is not None:
        text = str(refusal)
        assert name in text and len(text) < 3000, f"{told}: {text[:300]}"
    return refusal is not None


def head_config(folder: Path, rng: random.Random) -> Callable[[], Any]:
    stored, raw = mutated(head_forging.read(folder), rng)
    if raw and rng.random() < 0.5 and '"RAW"' not in json.dumps(stored):
        head_forging.write(folder, stored if isinstance(stored, dict) else {})
    else:
        stored.pop("sha256", None)  # the field is optional
        (folder / CONFIG_NAME).write_bytes(text_of(stored, raw))
    return lambda: loaded(folder)


def head_header(folder: Path, rng: random.Random) -> Callable[[], Any]:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, raw = mutated(json.loads(whole[8 : 8 + length]), rng)
    text = text_of(header, raw)
    length = rng.choice([len(text), len(text), len(text), len(text) + 1, 0, 2**63 - 1])
    data = struct.pack("<Q", length) + text + whole[8 + length :]
    head_forging.write(folder, weights=data)
    return lambda: loaded(folder)


def loaded(folder: Path) -> None:
    backbone = make_backbone("llama")
    try:
        dh.DualHeadForCausalLM.from_pretrained(folder, backbone=backbone)
    except ValueError:
        assert not isinstance(backbone, dh.DualHeadForCausalLM), "half attached"
        raise


@pytest.mark.parametrize("change", [head_config, head_header])
def test_heads(tmp_path, seed, change):
    rng, refused = random.Random(seed), 0
    make_model("llama", reward_head="lowrank", reward_rank=2, num_objectives=2).save_pretrained(
        tmp_path
    )
    kept = {name: (tmp_path / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
    for number in range(FILES):
        for name, data in kept.items():
            (tmp_path / name).write_bytes(data)
        act = change(tmp_path, rng)
        refused += tried(act, str(tmp_path), f"file {number}")
    assert refused > FILES / 3


def test_checkpoints_and_states(tmp_path, seed):
    rng, refused = random.Random(seed), 0
    state = {"optimizer": {0: {"exp_avg": torch.ones(3), "step": 4}}, "rng": (1, float("nan"))}
    with checkpoint.staged(tmp_path, 1) as folder:
        save_state(folder / "state", state)
    folder = tmp_path / "checkpoint-1"
    manifest, file = folder / "manifest.json", folder / "state"
    kept, whole = manifest.read_bytes(), file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for number in range(FILES):
        stored, raw = mutated(
            {k: v for k, v in json.loads(kept).items() if "manifest" not in k}, rng
        )
        own = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()
        manifest.write_bytes(text_of({**stored, "manifest_sha256": own}, raw))
        refused += tried(lambda: checkpoint.verify(folder), str(folder), f"manifest {number}")
        tree, raw = mutated(json.loads(header["__metadata__"]["tree"]), rng)
        changed = header["__metadata__"] | {"tree": text_of(tree, raw).decode(errors="replace")}
        text = json.dumps(header | {"__metadata__": changed}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        tried(lambda: load_state(file), str(file), f"tree {number}")
    assert refused > FILES / 3


def test_cached_hidden_states(tmp_path, seed):
    """Hostile values in the index. The next build has the right states again."""
    rng, refused = random.Random(seed), 0
    lengths, identity = [(2, 1), (1, 3), (2, 2)], {"a": 1, "b": "x"}
    states = [torch.randn(sum(pair), 4) for pair in lengths]

    def build():
        return open_or_build(
            tmp_path, identity, lengths, [[0, 1]], lambda rows: [states[i] for i in rows],
            progress=False,
        )  # fmt: skip

    build()
    for number in range(FILES):
        index = tmp_path / "index.json"
        stored, raw = mutated(json.loads(index.read_bytes()), rng)
        index.write_bytes(text_of(stored, raw))

        def read():
            cache = HiddenCache(tmp_path, identity, lengths)
            return [cache[i] for i in range(len(lengths))]

        refused += tried(read, "", f"index {number}", UnusableCacheError)
        cache = build()
        try:
            rows = [torch.cat(cache[i]) for i in range(len(lengths))]
        # A hash that no longer matches is reported, and the cache is not rebuilt
        except UnusableCacheError as error:
            assert str(tmp_path) in str(error)
            index.unlink()
            rows = [torch.cat(build()[i]) for i in range(len(lengths))]
        assert all(torch.equal(row, state) for row, state in zip(rows, states, strict=True))
    assert refused > FILES / 3


def test_preference_files(tmp_path, seed):
    """A file of pairs with one hostile row: whole or truncated, and with any file extension."""
    rng = random.Random(seed)
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
    for number in range(FILES):
        changed, raw = mutated(rows, rng)
        if rng.random() < 0.5:
            data = b"\n".join(text_of(row, raw) for row in changed)
        else:
            data = text_of(changed, raw)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data) + 1)]
        if rng.random() < 0.2:
            data = bytearray(data) or bytearray(1)
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / rng.choice(["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv"])
        path.write_bytes(data)
        tried(lambda p=path: load_preference_data(p), str(path), f"file {number}: {path.name}")
