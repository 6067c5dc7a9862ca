# SPDX-License-Identifier: Apache-2.0
"""docs/refused.md quotes the package's error messages."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sentences(source: str) -> list[str]:
    """The string constants of a module. f-strings have {} for each of their expressions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_every_quoted_sentence_is_said():
    said = [
        s for path in (ROOT / "dualhead_ext").rglob("*.py") for s in sentences(path.read_text())
    ]
    rows = re.findall(r"^\| .*? \| `(.*?)` \|", (ROOT / "docs/refused.md").read_text(), re.M)
    assert len(rows) > 10
    missing = [row for row in rows if not any(row in sentence for sentence in said)]
    assert not missing
