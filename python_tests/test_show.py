# SPDX-License-Identifier: Apache-2.0
"""What the terminal gets: colours where they are wanted, numbers elsewhere, never control codes."""

from __future__ import annotations

import io

import pytest

from dualhead_ext.cli import terminal as show


def rendered(color, tokens):
    stream = io.StringIO()
    show.print_tokens(show.console(color, stream), tokens)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("alpha", "color"),
    [(0.0, "#78aaff"), (0.5, "#e1e1e1"), (1.0, "#ffa046"), (0.25, "#acc6f0"), (2.0, "#ffa046")],
)
def test_the_scale_runs_from_blue_over_grey_to_orange(alpha, color):
    assert show.gate_color(alpha) == color


def test_colour_carries_alpha():
    text = rendered("always", [("Hi", 0.0), (" you", 1.0), ("!", None)])
    assert text == "\x1b[30;48;2;120;170;255mHi\x1b[0m\x1b[30;48;2;255;160;70m you\x1b[0m!\n"


def test_without_colour_numbers_stand_behind_the_tokens():
    assert rendered("never", [("Hi", 0.0), (" you", 0.987), ("\n", 0.5), ("!", None)]) == (
        "Hi{0.00} you{0.99}{0.50}\n!\n"
    )
    assert rendered("auto", [("Hi", 0.25)]) == "Hi{0.25}\n", "a file is not a terminal"


def test_an_unknown_alpha_is_not_shown():
    assert rendered("never", [("x", float("nan"))]) == "x\n"
    assert rendered("always", [("x", float("nan"))]) == "x\n"


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


def test_legends():
    for color, word in (("never", "braces"), ("always", "\x1b[48;2;")):
        stream = io.StringIO()
        show.print_legend(show.console(color, stream))
        assert word in stream.getvalue() and stream.getvalue().count("\n") == 1


class Bytes:
    """A tokenizer of one token per byte."""

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
