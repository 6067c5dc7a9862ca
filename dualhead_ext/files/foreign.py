# SPDX-License-Identifier: Apache-2.0
"""Quotations in messages from files that may come from anybody."""

from __future__ import annotations

from collections.abc import Iterable


def brief(value: object, most: int = 300) -> str:
    """``str(value)``, without its middle if it has more than ``most`` characters."""
    text = str(value)
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


def shown(names: Iterable[object]) -> str:
    """The first five names, and how many more there are."""
    texts = [brief(name, 80) for name in names]
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + more
