# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: contents, rotation, damaged folders, foreign and hostile files."""

import hashlib
import json
import logging
import os
import random
import socket
import time

import pytest
from bit_flips import flip

from dualhead_ext.files import checkpoint
from dualhead_ext.files.checkpoint import CheckpointError, latest_checkpoint, rotate, staged, verify

CONTENTS = {"heads.bin": bytes(range(256)) * 40, "state.json": b'{"step": 1}', "sub/deep": b""}


def fill(folder, contents=None):
    for name, data in (contents or CONTENTS).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def make(directory, *steps):
    for step in steps:
        with staged(directory, step) as folder:
            fill(folder, CONTENTS | {"state.json": b'{"step": %d}' % step})
    return directory


def read(path):
    return {name: (path / name).read_bytes() for name in verify(path)}


def hidden(directory):
    return [name for name in os.listdir(directory) if name.startswith(".")]


def test_round_trip(tmp_path):
    make(tmp_path, 3)
    assert read(tmp_path / "checkpoint-3") == CONTENTS | {"state.json": b'{"step": 3}'}
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3" and not hidden(tmp_path)


def test_highest_number_wins_not_the_name_nor_the_time(tmp_path):
    make(tmp_path, 100, 9, 20)
    assert latest_checkpoint(tmp_path).name == "checkpoint-100"


def test_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nowhere") is None


def test_an_exception_leaves_nothing(tmp_path):
    make(tmp_path, 1)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), staged(tmp_path, 2) as folder:
            fill(folder)
            raise error
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_the_same_step_again_takes_its_place(tmp_path):
    make(tmp_path, 5)
    with staged(tmp_path, 5) as folder:
        (folder / "new").write_bytes(b"new")
    assert read(tmp_path / "checkpoint-5") == {"new": b"new"} and not hidden(tmp_path)


@pytest.mark.parametrize("step", [-1, 1.0, True, "1"])
def test_a_step_is_a_number(tmp_path, step):
    with pytest.raises(ValueError, match="step must be an int >= 0"):
        checkpoint.begin(tmp_path, step)


def test_what_cannot_be_stored_is_refused_while_writing(tmp_path):
    make(tmp_path, 1)
    with pytest.raises(CheckpointError, match="link is not a regular file"):
        with staged(tmp_path, 2) as folder:
            (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="not the name of a file"):
        with staged(tmp_path, 2) as folder:
            (folder / "back\\slash").write_bytes(b"")
    assert os.listdir(tmp_path) == ["checkpoint-1"]


# --- rotation ------------------------------------------------------------------------------------


def steps(directory):
    return sorted(int(p.name.split("-")[1]) for p in directory.glob("checkpoint-*"))


def test_rotation_keeps_the_newest_and_what_it_is_told_to(tmp_path):
    make(tmp_path, 1, 2, 3, 4, 5)
    rotate(tmp_path, 3, keep=(tmp_path / "checkpoint-1",))
    assert steps(tmp_path) == [1, 4, 5]
    rotate(tmp_path, 1, keep=(tmp_path / "checkpoint-1",))
    assert steps(tmp_path) == [1, 5] and not hidden(tmp_path)


def test_rotation_counts_and_removes_whole_checkpoints_only(tmp_path, caplog):
    make(tmp_path, 1, 2, 3, 4)
    (tmp_path / "checkpoint-3" / "heads.bin").write_bytes(b"cut")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "model.bin").write_bytes(b"another program's")
    rotate(tmp_path, 2)
    assert steps(tmp_path) == [2, 3, 4, 9]
    assert "checkpoint-3" in caplog.text and "checkpoint-9" in caplog.text


def test_rotation_removes_nothing_while_the_newest_is_damaged(tmp_path):
    make(tmp_path, 1, 2, 3)
    # The size is right, so that only the hash shows the damage
    flip(tmp_path / "checkpoint-3" / "heads.bin", 77, 1)
    with pytest.raises(CheckpointError, match=r"heads\.bin has changed"):
        rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_rotation_needs_a_limit(tmp_path, limit):
    with pytest.raises(ValueError, match="limit must be an int >= 1"):
        rotate(make(tmp_path, 1), limit)


# --- damage --------------------------------------------------------------------------------------


def refused(directory, name, reason):
    """The damaged checkpoint-2 is refused with the reason, and checkpoint-1 is found instead."""
    with pytest.raises(CheckpointError, match=reason) as error:
        verify(directory / "checkpoint-2")
    assert name in str(error.value) and "checkpoint-2" in str(error.value)
    assert latest_checkpoint(directory) == directory / "checkpoint-1"


@pytest.mark.parametrize("name", [*CONTENTS, "manifest.json"])
def test_every_truncation_and_extension_is_noticed(tmp_path, name):
    make(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-2" / name
    whole = path.read_bytes()
    lengths = range(len(whole)) if len(whole) < 2000 else [*range(600), *range(600, 10240, 97)]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=name):
            verify(tmp_path / "checkpoint-2")
    path.write_bytes(whole + b"\n")
    refused(tmp_path, name, "must have|has changed")
    path.unlink()
    refused(tmp_path, name, "is missing|incomplete")


def test_bit_flips_are_noticed(tmp_path, seed):
    make(tmp_path, 1, 2)
    folder, generator = tmp_path / "checkpoint-2", random.Random(seed)
    for name in ("manifest.json", "state.json", "heads.bin"):
        path = folder / name
        bits = range(8 * path.stat().st_size)
        for bit in bits if len(bits) < 300 else generator.sample(bits, 300):
            flip(path, bit // 8, bit % 8)
            with pytest.raises(CheckpointError, match=name):
                verify(folder, contents=name != "manifest.json")
            flip(path, bit // 8, bit % 8)
    verify(folder)


def test_the_ones_passed_over_are_announced(tmp_path, caplog):
    make(tmp_path, 1, 2, 3, 4)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    flip(tmp_path / "checkpoint-3" / "heads.bin", 5, 0)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).name == "checkpoint-2"
    messages = [r.getMessage() for r in caplog.records]
    assert "checkpoint-4" in messages[0] and "incomplete or foreign" in messages[0]
    assert "checkpoint-3" in messages[1] and "heads.bin has changed" in messages[1]


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    make(tmp_path, 1, 2)
    real = os.open

    def broken(path, *arguments, **keywords):
        if "checkpoint-2/heads" in str(path):
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(checkpoint.os, "open", broken)
    assert latest_checkpoint(tmp_path).name == "checkpoint-1"


# --- foreign and hostile -------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    old = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(old)


@pytest.mark.parametrize("name", ["heads.bin", "extra", "manifest.json"])
@pytest.mark.parametrize(
    "plant",
    [
        pipe,
        unix_socket,
        lambda p: p.symlink_to("/etc/passwd"),
        lambda p: p.symlink_to("state.json"),
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.symlink_to("nowhere"),
        lambda p: p.write_bytes(b"foreign"),
        lambda p: p.mkdir() or (p / "file").write_bytes(b""),
    ],
)
def test_foreign_entries_are_refused_at_once(tmp_path, name, plant):
    make(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-2" / name
    path.unlink(missing_ok=True)
    plant(path)
    start = time.monotonic()
    reason = "not a regular file|is missing|not listed|must have|as a file|not valid JSON|changed"
    refused(tmp_path, name, reason)
    assert time.monotonic() - start < 1.0


def test_a_linked_checkpoint_is_not_picked(tmp_path):
    make(tmp_path, 1)
    (tmp_path / "checkpoint-7").symlink_to("checkpoint-1")
    assert latest_checkpoint(tmp_path).name == "checkpoint-1"


def forge(folder, files, **fields):
    """Write a manifest with arbitrary fields and a hash that matches them."""
    data = json.loads(checkpoint._manifest_bytes(files)) | fields
    if fields:
        body = {k: v for k, v in data.items() if k != "manifest_sha256"}
        data["manifest_sha256"] = hashlib.sha256(
            json.dumps(body, sort_keys=True).encode()
        ).hexdigest()
    (folder / "manifest.json").write_bytes(json.dumps(data, indent=1).encode() + b"\n")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        "/etc/passwd",
        "a/../../outside",
        "a//b",
        "./heads.bin",
        "",
        "a\\b",
        "C:evil",
        "nul\0",
        "x" * 4096,
        "\ud800",
        "manifest.json",
    ],
)
def test_names_that_point_elsewhere_are_refused(tmp_path, name):
    make(tmp_path, 1, 2)
    (tmp_path / "outside").write_bytes(b"secret")
    entry = {"size": 6, "sha256": "0" * 64}
    forge(tmp_path / "checkpoint-2", {name: entry})
    refused(tmp_path, "manifest.json", "is not the name of a file in its folder")


ENTRY = {"size": 1, "sha256": "0" * 64}
MANIFESTS = [
    (b"", "not valid JSON"),
    (b"\x80\x04K\x01.", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"a": 1, "a": 2}', "occurs twice"),
    (b'{"size": NaN}', "not valid JSON"),
    (b"9" * 5000, "not valid JSON"),
    (b" " * (5 * 2**20), "at most"),
    (b"[]", "not a manifest"),
    (b'{"format": "other"}', "not a manifest"),
    (b'{"format": "dualhead-checkpoint"}', "must list files"),
    (b'{"format": "dualhead-checkpoint", "format_version": 2, "files": {}}', "newer than 1"),
    (b'{"format": "dualhead-checkpoint", "format_version": 1, "files": {}}', "has changed"),
    (b'{"format": "dualhead-checkpoint", "format_version": 1, "files": []}', "must list files"),
]


@pytest.mark.parametrize(("data", "reason"), MANIFESTS)
def test_hostile_manifests_are_refused_by_name(tmp_path, data, reason):
    make(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2" / "manifest.json").write_bytes(data)
    refused(tmp_path, "manifest.json", reason)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        ENTRY | {"size": -1},
        ENTRY | {"size": True},
        ENTRY | {"size": "1"},
        {"size": 1},
        ENTRY | {"more": 1},
    ],
)
def test_hostile_entries_are_refused(tmp_path, entry):
    make(tmp_path, 1, 2)
    forge(tmp_path / "checkpoint-2", {"heads.bin": entry})
    refused(tmp_path, "manifest.json", "must|no valid size")


def test_a_newer_format_says_so_even_where_its_manifest_differs(tmp_path):
    make(tmp_path, 1, 2)
    forge(tmp_path / "checkpoint-2", {}, format_version=2, more="x")
    refused(tmp_path, "format version 2", "newer than 1.*update")


def test_a_foreign_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="incomplete or foreign"):
        verify(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify(folder / "optimizer.pt")
