# SPDX-License-Identifier: Apache-2.0
"""Output for a terminal: colours if they are wanted, else numbers, and never control codes."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dualhead_ext.cli import terminal as show


def rendered(color, tokens):
    stream = io.StringIO()
    show.print_tokens(show.console(color, stream), tokens)
    return stream.getvalue()


ALPHAS = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16]


@pytest.mark.parametrize(("system", "least"), [("truecolor", 9), ("256", 9), ("standard", 5)])
def test_a_small_range_of_alpha_takes_the_whole_palette(system, least):
    """A regression: alpha between 0.00 and 0.16 was a single blue."""
    stream = io.StringIO()
    to = Console(file=stream, force_terminal=True, color_system=system, soft_wrap=True)
    tokens = [(f"w{i}", alpha) for i, alpha in enumerate(ALPHAS)]
    show.print_tokens(to, tokens)
    styles = re.findall(r"\x1b\[([0-9;]+)m(w\d)\x1b", stream.getvalue())
    assert [word for _, word in styles] == [word for word, _ in tokens]
    assert len({style for style, _ in styles}) == least
    show.print_legend(to, tokens)
    legend = stream.getvalue().splitlines()[1]
    for style in {style for style, _ in styles}:
        assert f"\x1b[{style}m" in legend, "each colour stands in the legend"


def test_colour_carries_alpha():
    text = rendered("always", [("Hi", 0.0), (" you\n", 1.0), ("!", None)])
    assert text == "\x1b[30;48;5;69mHi\x1b[0m\x1b[30;48;5;202m you\x1b[0m\n!\n"


def test_without_colour_numbers_stand_behind_the_tokens():
    tokens = [("Hi", 0.0), (" you", 0.987), ("\n", 0.5), ("!", None)]
    assert rendered("never", tokens) == "Hi{0.00} you{0.99}{0.50}\n!\n"
    assert rendered("auto", [("Hi", 0.25)]) == "Hi{0.25}\n", "a file is not a terminal"
    near = rendered("never", [("a", 0.0011), ("b", 0.0013)])
    assert near == "a{0.0011}b{0.0013}\n", "as many digits as tell them apart"


def test_an_unknown_alpha_is_not_shown():
    for color in ("never", "always"):
        assert rendered(color, [("x", float("nan")), ("y", None)]) == "xy\n"


def test_no_color_is_honoured_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm-256color")
    assert show.has_color(show.console("auto", stream))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not show.has_color(show.console("auto", stream))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not show.has_color(show.console("auto", stream))


@pytest.mark.parametrize("color", ["always", "never"])
def test_a_model_cannot_drive_the_terminal(color):
    text = rendered(color, [("a\x1b]0;owned\x07\x9b2J\r\x00b\tc\nd [bold]", None)])
    assert text == "a�]0;owned��2J��b\tc\nd [bold]\n"


def test_an_unknown_colour_choice_is_named():
    with pytest.raises(ValueError, match="color must be one of auto, always, never, got 'red'"):
        show.console("red")


def legend(color, tokens):
    stream = io.StringIO()
    show.print_legend(show.console(color, stream), tokens)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()


def test_the_legend_says_the_range_in_numbers():
    tokens = [("low", 0.0), (" high", 0.18), ("?", None), ("\n", 0.09)]
    scale, closing = legend("always", tokens)
    numbers = "0.01 0.03 0.05 0.07 0.09 0.11 0.13 0.15 0.17".split()
    assert scale.split() == ["alpha", *numbers]
    assert closing == (
        "alpha: mean 0.09, smallest 0.00 at 'low' and largest 0.18 at 'high', of 3 tokens "
        "(0: backbone, 1: reward head)"
    )
    assert legend("never", tokens) == ["alpha follows each token in braces", closing]
    assert legend("always", [("a", 0.5), ("b", 0.5)]) == ["alpha: 0.50 at each of 2 tokens"]
    assert legend("always", [("a", None)]) == ["alpha: no token has one"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        *[("", 0), ("a" * 20, 0), ("a" * 21, 1), ("a\n\nb", 2), ("a" * 20 + "\nb", 1)],
        *[("日" * 10, 0), ("日" * 11, 1), ("a" * 19 + "日", 1), ("\t\t\tx", 1)],
    ],
)
def test_rows_that_a_text_takes(text, rows):
    assert show.rows_of(text, 20) == rows


class Bytes:
    """A tokenizer with one token per byte."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return bytes(i for i in ids if i != 0).decode(errors="replace")


def test_text_waits_for_whole_characters():
    text = show.TokenText(Bytes())
    said = "naïve 🙂 ok"
    pieces = [text.push(byte) for byte in said.encode()]
    assert "".join(pieces) == said
    assert "�" not in pieces and pieces.count("") == 4
    assert text.flush() == ""
    assert text.push(0) == "", "a special token is not shown"
    assert text.push(0xF0) == ""
    assert text.flush() == "�", "what never became a character is not lost"


def test_a_replacement_character_at_the_end_of_one_token_is_text():
    text = show.TokenText(Bytes())
    said = "�x"
    assert "".join(text.push(byte) for byte in said.encode()) + text.flush() == said


def test_accuracies():
    line = show.accuracy_line(46, 75, (0.5, 0.715))
    assert line == "61.3 % of 75 pairs (95 % interval 50.0 to 71.5 %)"
