# SPDX-License-Identifier: Apache-2.0
"""Building a cache of hidden states: its disk space, other runs that wait, crashes."""

import shutil
import threading

import faults
import pytest
from hidden_cache_cases import another_row, run
from trainer_cases import pairs


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
    run(tmp_path, tmp_path / "cache", data=another_row())  # it replaces the old cache


def test_the_announced_size_is_enough_and_not_far_off(tmp_path, capsys, small_shards):
    run(tmp_path, tmp_path / "cache")
    line = next(li for li in capsys.readouterr().out.splitlines() if "/train: hidden" in li)
    shown, unit = line.split(", ")[1].split()[:2]
    size = sum(p.stat().st_size for p in (tmp_path / "cache" / "train").iterdir())
    assert unit == "kB" and size / 1000 <= float(shown) <= 1.3 * size / 1000


def test_another_run_waits_for_the_one_that_builds(tmp_path):
    """And then reads what the other run has built."""
    import fcntl

    run(tmp_path, tmp_path / "cache")
    index = (tmp_path / "cache" / "train" / "index.json").read_bytes()
    (tmp_path / "cache" / "train" / "index.json").unlink()
    calls = []
    with open(tmp_path / "cache" / "train" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: calls.append(run(tmp_path, tmp_path / "cache")[1]))
        other.start()
        other.join(1.5)
        assert other.is_alive() and not (tmp_path / "cache" / "train" / "index.json").exists()
        (tmp_path / "cache" / "train" / "index.json").write_bytes(index)
    other.join(60)
    assert calls == [1]  # only the pass that measures the size


def test_killed_out_of_space_or_broken_at_every_call_of_a_build(tmp_path):
    """In an empty folder, and over a stale cache.

    An incomplete cache is never taken for a complete one, and the next build leaves only its own
    files.
    """
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
