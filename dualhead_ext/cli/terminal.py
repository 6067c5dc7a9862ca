# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows: tokens coloured by alpha, their legend, and accuracies with intervals.

Colour where the output is a terminal that takes it (rich decides, NO_COLOR and TERM=dumb
included); otherwise the same text with each token's alpha in braces behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

COLOR_NAMES = ("auto", "always", "never")
# Three anchors of a diverging scale, light enough for black letters on any terminal.
_SCALE = ((0.0, (120, 170, 255)), (0.5, (225, 225, 225)), (1.0, (255, 160, 70)))


def console(color: str = "auto", file: TextIO | None = None) -> Console:
    """A rich console on ``file`` (default: standard output).

    Args:
        color: ``"auto"`` (as the terminal and NO_COLOR say), ``"always"`` or ``"never"``.
    Raises:
        ValueError: another ``color``. ImportError: rich is not installed.
    """
    if color not in COLOR_NAMES:
        raise ValueError(f"console: color must be one of {', '.join(COLOR_NAMES)}, got {color!r}")
    from rich.console import Console

    stream = sys.stdout if file is None else file
    if color == "auto":
        return Console(file=stream, highlight=False, soft_wrap=True)
    if color == "never":
        return Console(file=stream, highlight=False, soft_wrap=True, color_system=None)
    return Console(
        file=stream,
        highlight=False,
        soft_wrap=True,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )


def has_color(to: Console) -> bool:
    """Whether colours would be seen there."""
    return to.color_system is not None and not to.no_color


def gate_color(alpha: float) -> str:
    """The colour of alpha in [0, 1] as ``"#rrggbb"``: blue at 0, grey at 0.5, orange at 1."""
    for (low, start), (high, end) in pairwise(_SCALE):
        if alpha <= high:
            share = max(0.0, (alpha - low) / (high - low))
            mixed = (round(a + share * (b - a)) for a, b in zip(start, end, strict=True))
            return "#" + "".join(f"{value:02x}" for value in mixed)
    return "#" + "".join(f"{value:02x}" for value in _SCALE[-1][1])


def printable(text: str) -> str:
    """``text`` with control characters replaced: a model must not drive the user's terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def print_token(to: Console, text: str, alpha: float | None = None) -> None:
    """Print one token's text as it comes; with ``alpha``, coloured by it or followed by it."""
    text = printable(text)
    if not text:
        return
    if alpha is None or alpha != alpha:
        to.file.write(text)  # not through rich, which makes spaces of tabs
    elif has_color(to):
        to.out(text, end="", highlight=False, style=f"black on {gate_color(alpha)}")
    else:
        # Line breaks last, so that a number never begins the next line.
        body = text.rstrip("\n")
        to.file.write(f"{body}{{{alpha:.2f}}}{text[len(body) :]}")
    to.file.flush()


def print_tokens(to: Console, tokens: Iterable[tuple[str, float | None]]) -> None:
    """Print ``(text, alpha)`` pairs on a line of their own."""
    for text, alpha in tokens:
        print_token(to, text, alpha)
    to.out("")


def print_legend(to: Console) -> None:
    """Say once how alpha is shown: the scale in colour, or the notation in plain text."""
    if not has_color(to):
        to.out("alpha behind each token in braces: {0.00} backbone ... {1.00} reward head")
        return
    to.out("alpha: 0 backbone ", end="")
    for tenth in range(11):
        to.out("  ", end="", style=f"on {gate_color(tenth / 10)}")
    to.out(" 1 reward head")


class TokenText:
    """Text of token ids one at a time, holding back bytes that do not make a character yet.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens=...)``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: some tokenizers need the token before
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes, "" while it is in the middle of a character."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What was held back, as it is."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if not final and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def percent(share: float) -> str:
    """A share as "61.3 %"."""
    return f"{100 * share:.1f} %"


def accuracy_line(correct: int, total: int, interval: tuple[float, float]) -> str:
    """For instance ``61.3 % of 300 pairs (95 % interval 55.6 to 66.6 %)``."""
    low, high = interval
    share = percent(correct / total) if total else "no"
    return f"{share} of {total} pairs (95 % interval {100 * low:.1f} to {percent(high)})"
