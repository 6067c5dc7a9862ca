# SPDX-License-Identifier: Apache-2.0
"""Every block of Python or shell in README and docs runs.

The blocks of a page run in order, in one namespace and one folder. The folder holds what a reader
would have: heads trained on the built-in model, pairs, ranked lists and questions. A comment before
a block configures this test, and a reader does not see it:

    <!-- not run: the reason -->
    <!-- test: text => its replacement; text => its replacement -->     e.g. smaller sizes

Blocks of other languages (text, json, diff) are not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dualhead_ext as dh
from dualhead_ext import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (not run|test): ((?:(?!-->).)*) -->\s*\Z", re.DOTALL)
LANGUAGES = {"python", "sh", "text", "json", "diff"}
# Commands of a shell block that are checked but not run: they would change the environment.
INSTALLS = ("pip install ",)


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line in the page, its language, its code, and why it is not run."""

    line: int
    language: str
    code: str
    not_run: str | None = None


def blocks_of(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        code, line = textwrap.dedent(match[3]), text[: match.start()].count("\n") + 1
        comment = COMMENT.search(text[: match.start()])
        reason = None
        if comment and comment[1] == "not run":
            reason = comment[2]
        elif comment:
            for change in comment[2].split("; "):
                old, new = change.split(" => ")
                assert old in code, f"line {line}: the comment replaces {old!r}, which is not there"
                code = code.replace(old, new)
        yield Block(line, match[2], code, reason)


# Pages that train with several processes or on several kinds of data.
LONG = [ROOT / "docs" / name for name in ("generation.md", "scale.md", "training.md")]
PAGES_WITH_CODE = [
    pytest.param(page, marks=pytest.mark.slow) if page in LONG else page
    for page in PAGES
    if any(b.language in ("python", "sh") for b in blocks_of(page.read_text()))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages assume."""
    folder = tmp_path_factory.mktemp("docs")
    rows = dh.data.load_preference_data("embedded")[:8]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    (folder / "questions.txt").write_text("How do I bake bread?\nWhat is rain?\n")
    words = ["Yes.", "No, I would not do that.", "It is, I think, rather a long story."]
    ranked = [
        {"prompt": f"Question {i}?", "responses": words, "scores": [2.0, 1.0, 0.0]}
        for i in range(8)
    ]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            cli.main(["train", "--data", "ranked.jsonl", "--epochs", "1", "--output", "heads"]) == 0
        )
    (folder / "ranked.jsonl").unlink()
    return folder


def run_shell(code: str) -> None:
    """Run a shell block: `dualhead` in this process, which has imported torch, the rest in bash."""
    for command in re.split(r"(?<!\\)\n", code.strip()):
        words = shlex.split(command, comments=True)
        if not words or command.startswith(INSTALLS):
            continue
        if words[0] == "dualhead" and not {"|", ">", "<"} & set(words):
            try:
                code_of_exit = cli.main(words[1:])
            except SystemExit as stop:
                code_of_exit = stop.code
            assert not code_of_exit, command
        else:
            where = f'dualhead() {{ {shlex.quote(sys.executable)} -m dualhead_ext.cli "$@"; }}\n'
            done = subprocess.run(
                ["bash", "-ec", where + command], capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, place, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "work"
    shutil.copytree(place, folder)
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    names: dict = {"__name__": "__main__"}
    for block in blocks_of(page.read_text()):
        if block.not_run is not None or block.language not in ("python", "sh"):
            continue
        where = f"{page.name}, line {block.line}"
        try:
            if block.language == "python":
                exec(compile(block.code, where, "exec"), names)
            else:
                run_shell(block.code)
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}\n{block.code}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_block_names_its_language(page):
    for block in blocks_of(page.read_text()):
        assert block.language in LANGUAGES, f"line {block.line}: {block.language!r}"


def test_blocks_are_found():
    text = (
        "```python\na = 1\n```\n\n1. a\n\n    <!-- test: 2 => 3; b => c -->\n"
        "    ```sh\n    b 2\n    ```\n\n<!-- not run: why -->\n```sh\nrm x\n```\n"
    )
    assert list(blocks_of(text)) == [
        Block(1, "python", "a = 1\n"),
        Block(8, "sh", "c 3\n"),
        Block(13, "sh", "rm x\n", "why"),
    ]
    with pytest.raises(AssertionError, match="which is not there"):
        list(blocks_of("<!-- test: 5 => 6 -->\n```sh\na\n```\n"))
