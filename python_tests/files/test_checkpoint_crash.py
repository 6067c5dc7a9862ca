# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under crashes and full or broken disks, at every call that changes the disk."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import faults
import pytest
from test_checkpoint import hidden, make

from dualhead_ext.files.checkpoint import latest_checkpoint

SCRIPT = """
import json, logging, os, shutil
from pathlib import Path
import torch
import faults
from dualhead_ext.files import checkpoint
from dualhead_ext.files.state_file import load_state, save_state

logging.disable()
STATE = {{"optimizer": {{0: {{"exp_avg": torch.ones(300), "step": 4}}}}, "rng": (1, 2.5, None)}}

def save(directory, step, text="old"):
    with checkpoint.staged(directory, step) as folder:
        (folder / "text").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "bytes").write_bytes(b"1" * 20000)
        save_state(folder / "optimizer.safetensors", STATE)

def whole(path, texts):
    assert checkpoint.verify(path) == ["deep/bytes", "optimizer.safetensors", "text"]
    assert (path / "deep" / "bytes").read_bytes() == b"1" * 20000
    assert (path / "text").read_text() in texts
    assert torch.equal(load_state(path / "optimizer.safetensors")["optimizer"][0]["exp_avg"],
                       torch.ones(300))

def left_over(directory):
    return [n for n in os.listdir(directory) if n.startswith(".")]

def visible(directory):
    for path in directory.glob("checkpoint-*"):
        whole(path, ("old",))  # raises for one that is half removed

def usable(directory, allowed, texts):
    latest = checkpoint.latest_checkpoint(directory)
    if latest is None or latest.name not in allowed:
        return f"latest is {{latest}}"
    whole(latest, texts)
    if latest.name != "checkpoint-1" and "checkpoint-1" in allowed:
        whole(directory / "checkpoint-1", texts)
    save(directory, 9)
    if left_over(directory):
        return f"the next save left {{left_over(directory)}}"
    if checkpoint.latest_checkpoint(directory).name != "checkpoint-9":
        return "the next save is not the latest"

{body}
"""


def run_script(tmp_path, body):
    return faults.run(SCRIPT.format(body=textwrap.dedent(body)), tmp_path)


def assert_no_problem(results, least):
    for name, result in results.items():
        assert not result["problems"], f"{name}: " + "\n".join(result["problems"])
        assert result["points"] >= least, f"{name} met {result['points']} points only"


def test_killed_at_every_call_of_a_save(tmp_path):
    """For a new checkpoint, for one that replaces another, and for a rotation."""
    results = run_script(
        tmp_path,
        """
        def again(directory):
            save(directory, 1)
            save(directory, 2)

        def three(directory):
            for step in (1, 2, 3):
                save(directory, step)

        print(json.dumps({
            "new": faults.every_point("kill", lambda d: save(d, 1), lambda d: save(d, 2),
                lambda d, outcome: usable(d, ("checkpoint-1", "checkpoint-2"), ("old",))),
            "again": faults.every_point("kill", again, lambda d: save(d, 2, "new"),
                lambda d, outcome: usable(d, ("checkpoint-2",), ("old", "new"))),
            "rotate": faults.every_point("kill", three, lambda d: checkpoint.rotate(d, 1),
                lambda d, outcome: visible(d) or usable(d, ("checkpoint-3",), ("old",))),
        }))
        """,
    )
    assert_no_problem(results, least=12)


@pytest.mark.slow
def test_a_full_or_broken_disk_at_every_call(tmp_path):
    results = run_script(
        tmp_path,
        """
        def check(directory, outcome):
            if outcome == "done":  # an existing folder need not be made: then it must be saved
                return usable(directory, ("checkpoint-2",), ("old",))
            if "full" in kind and "No space left" not in outcome and "os error 28" not in outcome:
                return "the error does not name the reason"
            if kind == "full" and left_over(directory):
                return f"left {left_over(directory)}"
            return usable(directory, ("checkpoint-1", "checkpoint-2"), ("old",))

        results = {}
        for kind in ("full", "broken"):
            results[kind] = faults.every_point(
                kind, lambda d: save(d, 1), lambda d: save(d, 2), check)
        print(json.dumps(results))
        """,
    )
    assert_no_problem(results, least=12)


def test_interrupted_and_short_writes_are_carried_through(tmp_path):
    results = run_script(
        tmp_path,
        """
        def check(directory, outcome):
            return None if outcome == "done" and usable(
                directory, ("checkpoint-2",), ("old",)) is None else "not saved"

        both = ("write", "fsync")
        print(json.dumps({
            kind: faults.every_point(kind, lambda d: save(d, 1), lambda d: save(d, 2), check,
                                     only=lambda entry: entry[0] in calls)
            for kind, calls in (("interrupted", both), ("short", ("write",)))
        }))
        """,
    )
    assert_no_problem(results, least=4)


def test_everything_is_on_the_disk_before_its_name_is(tmp_path):
    """After a power loss the rename may be on the disk, but not data that was not synchronised."""
    body = """
        def problems(log):
            rename = next(i for i, e in enumerate(log) if e[0] == "rename" and "staging" in e[1]
                          and e[2] == "checkpoint-2")
            staging, found = log[rename][1], []
            root = Path("again")
            save(root, 2)
            for path in sorted((root / "checkpoint-2").rglob("*")):
                name = f"{staging}/{path.relative_to(root / 'checkpoint-2')}"
                synced = [i for i, e in enumerate(log[:rename]) if e[:2] == ["fsync", name]]
                written = [i for i, e in enumerate(log) if e[0] in ("write", "create")
                           and e[1] == name]
                if not synced or max(written, default=-1) > synced[-1]:
                    found.append(name)
            created = [i for i, e in enumerate(log[:rename]) if e[0] == "create"]
            if not any(e[:2] == ["fsync", staging] for e in log[max(created):rename]):
                found.append("staging folder")
            if not any(e[:2] == ["fsync", "."] for e in log[rename:]):
                found.append("parent folder")
            shutil.rmtree(root)
            return found

        log = faults.record(lambda d: save(d, 1), lambda d: save(d, 2))
        good = problems(log)
        real, os.fsync = os.fsync, lambda descriptor: None
        bad = problems(faults.record(lambda d: save(d, 1), lambda d: save(d, 2)))
        print(json.dumps({"good": good, "without_fsync": bad}))
        """
    found = run_script(tmp_path, body)
    assert found["good"] == []
    # Four files, two folders and the parent: each is found missing
    assert len(found["without_fsync"]) == 7


def test_the_harness_sees_what_an_unsafe_save_breaks(tmp_path):
    """The faults must break an unsafe save, which writes in place and loads the highest number."""
    results = run_script(
        tmp_path,
        """
        def naive(directory):
            folder = directory / "checkpoint-2"
            folder.mkdir()
            (folder / "text").write_text("old")
            save_state(folder / "optimizer.safetensors", STATE)

        def check(directory, outcome):
            highest = max(p for p in directory.iterdir() if p.name.startswith("checkpoint"))
            try:
                assert (highest / "text").read_text() == "old"
                load_state(highest / "optimizer.safetensors")
            except Exception as error:
                return f"broken: {type(error).__name__}"

        print(json.dumps({k: faults.every_point(k, lambda d: save(d, 1), naive, check)
                          for k in ("kill", "full")}))
        """,
    )
    assert len(results["kill"]["problems"]) >= 3 and len(results["full"]["problems"]) >= 3


HERE = (Path(__file__).parent, Path(__file__).parents[1])
STRACE_POINTS = ["fsync:1", "fsync:3", "fsync:5", "mkdir:1", "rename:1", "rename:2", "unlink:1"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_killed_by_strace_at_real_system_calls(tmp_path):
    """Check the shim against the kernel: overwrite a checkpoint, then rotate."""
    program = """
import sys
sys.path[:0] = sys.argv[2:]
from test_checkpoint import make, rotate
make(__import__("pathlib").Path(sys.argv[1]), 2)
rotate(sys.argv[1], 1)
"""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    for point in STRACE_POINTS:
        call, count = point.split(":")
        directory = make(tmp_path / point.replace(":", "_"), 1, 2)
        family = {"rename": "rename,renameat,renameat2", "unlink": "unlink,unlinkat,rmdir"}
        calls = family.get(call, call)
        done = subprocess.run(
            [
                *("strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}"),
                *("-e", f"inject={calls}:signal=KILL:when={count}"),
                *(sys.executable, "-c", program, str(directory), *map(str, HERE)),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if "ptrace" in done.stderr and "not permitted" in done.stderr:
            pytest.skip("strace may not trace here")
        assert done.returncode != 0, f"{point}: nothing was killed\n{done.stderr}"
        assert latest_checkpoint(directory).name == "checkpoint-2", point
        make(directory, 3)
        assert not hidden(directory) and latest_checkpoint(directory).name == "checkpoint-3"
