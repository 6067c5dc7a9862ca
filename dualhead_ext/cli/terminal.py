# SPDX-License-Identifier: Apache-2.0
"""Terminal output: tokens coloured by alpha, their legend, and accuracies with intervals.

Colours are used if the output is a terminal that supports them (rich decides, also by NO_COLOR and
TERM=dumb). Otherwise alpha follows each token in braces. Colours and digits are scaled to the
text's own range of alpha.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from ..eval.alpha_scale import COLORS, STYLES_16, AlphaScale

if TYPE_CHECKING:
    from rich.console import Console

COLOR_NAMES = ("auto", "always", "never")
# The text of a token, and its alpha or None.
Token = tuple[str, float | None]


def console(color: str = "auto", file: TextIO | None = None) -> Console:
    """A rich console on ``file`` (default: standard output).

    Args:
        color: ``"auto"`` (according to the terminal and NO_COLOR), ``"always"`` or ``"never"``.
    Raises:
        ValueError: another ``color``.
        ImportError: rich is not installed.
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
    """Whether a console shows colours."""
    return to.color_system is not None and not to.no_color


def style_of(to: Console, scale: AlphaScale, alpha: float) -> str:
    """The rich style of alpha on a console with colours: nine of 256 colours, or five of 16."""
    if to.color_system in ("256", "truecolor"):
        return f"black on color({COLORS[scale.level(alpha, len(COLORS))][0]})"
    return STYLES_16[scale.level(alpha, len(STYLES_16))]


def printable(text: str) -> str:
    """``text`` with control characters replaced: a model must not drive the user's terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def print_text(to: Console, text: str) -> None:
    """Print a part of a streamed text."""
    to.file.write(printable(text))  # not through rich, which replaces tabs by spaces
    to.file.flush()


def print_tokens(to: Console, tokens: Sequence[Token]) -> None:
    """Print a text coloured by alpha, or with alpha in braces after each token, and a newline."""
    scale = AlphaScale.of(alpha for _, alpha in tokens)
    for text, alpha in tokens:
        text = printable(text)
        if not text:
            continue
        if scale is None or alpha is None or alpha != alpha:
            to.file.write(text)
        elif has_color(to):
            # No background for line breaks and tabs: it would extend to the edge.
            for part in _parts(text):
                style = None if part.isspace() and part != " " else style_of(to, scale, alpha)
                to.out(part, end="", highlight=False, style=style)
        else:
            # The number precedes line breaks, so that it never begins the next line.
            body = text.rstrip("\n")
            to.file.write(f"{body}{{{scale.number(alpha)}}}{text[len(body) :]}")
    to.file.write("\n")
    to.file.flush()


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r"(\n+|\t+)", text) if part]


def print_legend(to: Console, tokens: Sequence[Token]) -> None:
    """Print the alpha of each colour, and the mean, smallest and largest alpha."""
    found = [(alpha, text) for text, alpha in tokens if alpha is not None and alpha == alpha]
    scale = AlphaScale.of(alpha for alpha, _ in found)
    if scale is None:
        to.out("alpha: no token has one")
        return
    if scale.flat:
        to.out(f"alpha: {scale.number(scale.low)} at each of {len(found)} tokens")
        return
    if has_color(to):
        count = len(COLORS) if to.color_system in ("256", "truecolor") else len(STYLES_16)
        to.out("alpha ", end="")
        for level in range(count):
            middle = scale.middle(level, count)
            to.out(f" {scale.number(middle)} ", end="", style=style_of(to, scale, middle))
        to.out("")
    else:
        to.out("alpha follows each token in braces")
    ends = " and ".join(
        f"{word} {scale.number(alpha)} at {printable(text.strip()) or 'white space'!r}"
        for word, (alpha, text) in (("smallest", min(found)), ("largest", max(found)))
    )
    mean = scale.number(fmean(alpha for alpha, _ in found))
    to.out(f"alpha: mean {mean}, {ends}, of {len(found)} tokens (0: backbone, 1: reward head)")


def rows_of(text: str, width: int) -> int:
    """The number of rows that a text takes on a terminal of ``width`` columns, minus one."""
    from rich.cells import cell_len

    row = column = 0
    for character in printable(text):
        if character == "\n":
            row, column = row + 1, 0
            continue
        wide = 8 - column % 8 if character == "\t" else cell_len(character)
        if column + wide > width:
            if character == "\t":  # stops at the edge
                column = width
                continue
            row, column = row + 1, 0
        column += wide
    return row


def erase(to: Console, text: str) -> bool:
    """Erase a text that was printed from the start of a line. Returns False if part of it is no
    longer on the screen, or the output is not a suitable terminal.
    """
    if not to.file.isatty() or to.is_dumb_terminal:
        return False
    rows = rows_of(text, to.width)
    if rows >= to.height - 1:
        return False
    to.file.write("\r" + (f"\x1b[{rows}A" if rows else "") + "\x1b[J")
    return True


class TokenText:
    """Decodes token ids one at a time, and holds back bytes of incomplete characters.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens=...)``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: some tokenizers need the previous token
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes; "" in the middle of a character."""
        self._ids.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """The text that was held back."""
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
