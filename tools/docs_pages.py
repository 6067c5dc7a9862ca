# SPDX-License-Identifier: Apache-2.0
"""A hook of MkDocs: pages that are written elsewhere, and links that lead out of docs/.

README.md is the home page; CONTRIBUTING.md, CHANGELOG.md and every file that a page links to lie in
the site at their places in the repository. So a link means the same on the site and in a checkout.
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
# Page of the site -> its source, for pages that are not in docs/.
ELSEWHERE = {
    HOME: "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
COMMANDS = "cli.md"
# A link or an image of Markdown, without a title: [text](target#anchor).
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(\))")


def sources() -> dict[str, str]:
    """Every page's path in the repository by its path in the site."""
    docs = {path.relative_to(ROOT / "docs"): path for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.as_posix(): path.relative_to(ROOT).as_posix() for page, path in docs.items()}
    return pages | ELSEWHERE


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    pages = {source: page for page, source in ELSEWHERE.items()}
    return pages.get(path, path.removeprefix("docs/"))


def linked(source: str) -> Iterator[str]:
    """The files of the repository that a page links to."""
    for _, target, _, _ in LINK.findall((ROOT / source).read_text()):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def outside(pages: dict[str, str]) -> dict[str, str]:
    """The files to add, by their places in the site: what pages link to, and what those do."""
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
    """The help of every command, from its parser."""
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
    """A link by the target's place in the repository becomes one by its place in the site."""
    place = page.file.src_uri
    source = outside(sources()).get(place, f"docs/{place}")
    here, folder = posixpath.dirname(place), posixpath.dirname(source)

    def moved(link: re.Match) -> str:
        target = in_site(posixpath.normpath(posixpath.join(folder, link[2])))
        return f"{link[1]}{posixpath.relpath(target, here or '.')}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)
