# SPDX-License-Identifier: Apache-2.0
"""``dualhead inspect``: alpha and the predictions of both heads for a given text; and its page."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from . import terminal as show
from .decoding import as_utf8, check_length, encode, gate_options
from .errors import UserError, argument
from .models import check_heads, load, quiet_transformers


def inspect(arguments: Namespace) -> None:
    """Print the text with alpha of each token, or write a page of it."""
    check_page(arguments)
    if not arguments.text:
        raise UserError("--text: expected some text, got none")
    for name in ("text", "prompt"):
        if (given := getattr(arguments, name)) is not None:
            with argument(f"--{name}"):
                setattr(arguments, name, as_utf8(given))
    check_heads(arguments)
    with argument():
        to = show.console(arguments.color)
        quiet_transformers(arguments.backbone)
    model, tokenizer = load(arguments)
    ids, start = _tokens(arguments, tokenizer)
    check_length(len(ids), model, 0)
    options = gate_options(arguments, model)
    settings = [options]
    if arguments.strengths:
        settings = [options | {"strength": strength} for strength in arguments.strengths]
    runs = inspections(model, tokenizer, [(ids, setting) for setting in settings], start)
    if arguments.html is not None:
        save_page(arguments.html, runs, arguments.prompt or arguments.text)
        return
    tokens = [(token.text, token.alpha) for token in runs[0].tokens]
    show.print_text(to, runs[0].prompt if arguments.prompt is None else "")
    show.print_tokens(to, tokens)
    show.print_legend(to, tokens)
    kl = sum(token.kl for token in runs[0].tokens) / len(tokens)
    to.out(f"KL from the backbone: {kl:.4f} nats per token")


def _tokens(arguments: Namespace, tokenizer: Any) -> tuple[list[int], int]:
    """(ids of prompt and text, where the text begins)."""
    if arguments.prompt is None:
        ids = tokenizer(arguments.text)["input_ids"]
        if len(ids) < 2:
            raise UserError("--text: expected at least two tokens, as nothing predicts the first")
        return ids, 1
    ids = encode(arguments.prompt, tokenizer)["input_ids"][0].tolist()
    return ids + tokenizer(arguments.text, add_special_tokens=False)["input_ids"], len(ids)


def check_page(arguments: Namespace) -> None:
    """Refuse a page that cannot be written, before a model is loaded.

    Raises:
        UserError: naming the option.
    """
    if arguments.strengths is not None:
        if arguments.html is None:
            raise UserError("--strengths: expected only with --html FILE")
        if min(arguments.strengths) < 0:
            raise UserError(
                f"--strengths: expected numbers of at least 0, got {min(arguments.strengths):g}"
            )
    if arguments.html is None:
        return
    folder = os.path.dirname(arguments.html) or "."
    if os.path.isdir(arguments.html) or not os.access(folder, os.W_OK):
        raise UserError(f"--html: expected a file that can be written, got {arguments.html}")


def inspections(
    model: Any, tokenizer: Any, texts: Sequence[tuple[list[int], dict[str, Any]]], start: int
) -> list[Any]:
    """An `Inspection` for each (ids, the gate's controls). Tokens before ``start`` are the prompt.
    Empty texts are left out.
    """
    from ..eval.inspection import inspect_tokens

    with argument():
        return [
            inspect_tokens(model, tokenizer, ids, start, label=_label(controls), **controls)
            for ids, controls in texts
            if len(ids) > start
        ]


def _label(controls: dict[str, Any]) -> str:
    """The controls in words, the strength first."""
    named = {"strength": controls.get("strength", 1.0)} | controls
    values = {
        name: value if isinstance(value, float) else ",".join(f"{x:g}" for x in value.tolist())
        for name, value in named.items()
    }
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in values.items()
    )


def save_page(path: str, runs: Sequence[Any], title: str) -> None:
    """Write the page and say where.

    Raises:
        UserError: nothing to show, or the file cannot be written.
    """
    from ..eval.inspection import write_page

    if not runs:
        raise UserError("--html: expected a text, but the reply is empty")
    with argument("--html"):
        write_page(path, runs, title if len(title) <= 80 else f"{title[:79]}…")
    print(f"page of {len(runs)} {'text' if len(runs) == 1 else 'texts'} in {path}")
