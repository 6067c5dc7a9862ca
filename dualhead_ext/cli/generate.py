# SPDX-License-Identifier: Apache-2.0
"""``dualhead generate``: a prompt's continuation, streamed, with the alpha of each token."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from ..head.controls import Controls
from . import terminal as show
from .decoding import as_utf8, check_length, controls_of, decoding_options, encode
from .errors import UserError, argument
from .inspect import check_page, inspections, save_page
from .models import check_heads, load, quiet_transformers
from .reply import Reply, print_gate, write_reply


def generate(arguments: Namespace) -> None:
    """Print the text as it is generated, and write the page."""
    _refuse_gate_without_heads(arguments)
    check_page(arguments)
    check_heads(arguments)
    prompt = _prompt(arguments)
    with argument():
        to = show.console(arguments.color)
        quiet_transformers(arguments.backbone)
    model, tokenizer = load(arguments)
    inputs = encode(prompt, tokenizer, raw=arguments.raw).to(model.device)
    check_length(inputs["input_ids"].shape[1], model, arguments.max_new_tokens)
    options = decoding_options(arguments, model)

    def write(options: dict[str, Any], print: Any = None) -> Reply:
        import torch

        torch.manual_seed(arguments.seed)
        return write_reply(model, tokenizer, inputs, options, raw=arguments.raw, print=print)

    # Colours need the reply's range of alpha. On a terminal the plain text is streamed meanwhile.
    streamed = not arguments.show_gate or to.file.isatty()
    reply = write(options, (lambda text: show.print_text(to, text)) if streamed else None)
    if arguments.show_gate:
        print_gate(to, reply, streamed)
    else:
        show.print_text(to, "\n")
    if arguments.html is not None:
        settings = [options]
        if arguments.strengths:
            settings = [options | {"strength": strength} for strength in arguments.strengths]
        replies = [reply if setting == options else write(setting) for setting in settings]
        texts = [
            (reply.sequence, controls_of(setting))
            for reply, setting in zip(replies, settings, strict=True)
        ]
        start = inputs["input_ids"].shape[1]
        save_page(arguments.html, inspections(model, tokenizer, texts, start), prompt)


def _refuse_gate_without_heads(arguments: Namespace) -> None:
    if not arguments.backbone_only:
        return
    for name in (*Controls.NAMES, "show_gate", "html", "strengths", "quantize"):
        if getattr(arguments, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--backbone-only: expected no option of the gate or heads with it, got {option}"
            )


def _prompt(arguments: Namespace) -> str:
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("prompt: expected an argument or text on standard input, got neither")
        with argument("standard input"):
            prompt = sys.stdin.read()
    with argument("prompt"):
        prompt = as_utf8(prompt)
    if not arguments.raw:
        prompt = prompt.strip()
    if not prompt:
        raise UserError("prompt: expected some text, got none")
    return prompt
