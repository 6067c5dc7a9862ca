# SPDX-License-Identifier: Apache-2.0
"""The documentation: the site builds offline and without warnings, and lines of prose are short.

test_docs_code.py runs the code in it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += [ROOT / "benchmarks/results/README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
WIDTH = 120
# An address that a browser would fetch when it opens a page.
FETCHED = re.compile(
    r"""<(?:script|img|source|iframe)[^>]*\bsrc=["']?(?:https?:)?//|"""
    r"""<link[^>]*\brel=["']?(?:stylesheet|preload|preconnect)[^>]*\bhref=["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `make docs`, where a warning is an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    environment["https_proxy"] = environment["http_proxy"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    home = (site / "index.html").read_text()
    assert 'href="training.html"' in home and "docs/training.md" not in home


def test_the_reference_is_of_the_docstrings(site):
    import dualhead_ext as dh

    pages = {path.stem: path.read_text() for path in (site / "api").glob("*.html")}
    everything = "".join(pages.values())
    for name in dh.__all__:
        if not name.startswith("__"):
            assert re.search(rf'id="dualhead_ext\.(\w+\.)*{name}[."]', everything), name
    assert "A dual head of its own" in pages["heads"]
    assert ":class:" not in everything and ":func:" not in everything


def test_the_pages_fetch_nothing(site):
    for page in site.rglob("*.html"):
        assert not FETCHED.search(page.read_text()), page
    assert FETCHED.search('<script src="https://example.org/x.js">')
    assert FETCHED.search('<link rel="stylesheet" href="//example.org/x.css">')


def long_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of prose that are too long. Code, tables and comments are not prose.

    A line that is one long word, such as a link, cannot be shorter.
    """
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith(("|", "<!--")) and len(line) > WIDTH:
            if " " in line.strip().lstrip("-*0123456789. "):
                yield number, line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_fits_a_line(page):
    assert [number for number, _ in long_lines(page.read_text())] == []


def test_long_lines_are_found():
    long = "word " * 30
    text = f"{long}\n```\n{long}\n```\n| {long} |\n[{'x' * 130}](y)\n- {long}\n"
    assert [number for number, _ in long_lines(text)] == [1, 7]
