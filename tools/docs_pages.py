# SPDX-License-Identifier: Apache-2.0
"""An MkDocs hook: adds pages from outside docs/ and resolves links that lead out of docs/.

README.md is the home page. CONTRIBUTING.md, CHANGELOG.md and every file that a page links to have
the same path in the site as in the repository, so a link works both on the site and in a checkout.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = "index.md"
# Page of the site -> source file, for pages that are not in docs/.
ELSEWHERE = {
    HOME: "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
COMMANDS = "cli.md"
# A link or an image of Markdown, without a title: [text](target#anchor).
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(\))")


def sources() -> dict[str, str]:
    """Path in the site -> path in the repository, for every page."""
    docs = {path.relative_to(ROOT / "docs"): path for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.as_posix(): path.relative_to(ROOT).as_posix() for page, path in docs.items()}
    return pages | ELSEWHERE


def in_site(path: str) -> str:
    """The path in the site of a file of the repository."""
    pages = {source: page for page, source in ELSEWHERE.items()}
    return pages.get(path, path.removeprefix("docs/"))


def linked(source: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    for _, target, _, _ in LINK.findall((ROOT / source).read_text()):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def outside(pages: dict[str, str]) -> dict[str, str]:
    """Path in the site -> file to add: files that pages link to, directly or indirectly."""
    found = dict(ELSEWHERE)
    waiting = list(pages.values())
    while waiting:
        for path in linked(waiting.pop()):
            if path.startswith("docs/") or path in found.values() or not (ROOT / path).is_file():
                continue
            found[in_site(path)] = path
            if path.endswith(".md"):
                waiting.append(path)
    return found


def commands() -> str:
    """The help text of every command, as Markdown."""
    from dualhead_ext.cli import build_parser

    os.environ["COLUMNS"] = "100"  # the width that argparse prints for
    parser = build_parser()
    (subparsers,) = (action for action in parser._actions if action.dest == "command")
    text = "# Command line\n"
    for name, one in {"": parser, **subparsers.choices}.items():
        text += f"\n## {f'dualhead {name}'.strip()}\n\n```text\n{one.format_help()}```\n"
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files that are not in docs/."""
    from mkdocs.structure.files import File

    for place, path in outside(sources()).items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, COMMANDS, content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links from paths in the repository to paths in the site."""
    place = page.file.src_uri
    source = outside(sources()).get(place, f"docs/{place}")
    here, folder = posixpath.dirname(place), posixpath.dirname(source)

    def moved(link: re.Match) -> str:
        target = in_site(posixpath.normpath(posixpath.join(folder, link[2])))
        return f"{link[1]}{posixpath.relpath(target, here or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)
