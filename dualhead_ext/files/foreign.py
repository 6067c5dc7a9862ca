# SPDX-License-Identifier: Apache-2.0
"""What messages quote of files that anybody may have written."""

from __future__ import annotations


def brief(value: object, most: int = 300) -> str:
    """``str(value)``, its middle left out where it has more than ``most`` characters."""
    text = str(value)
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"
