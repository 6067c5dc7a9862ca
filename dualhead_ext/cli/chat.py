# SPDX-License-Identifier: Apache-2.0
"""``dualhead chat``: a conversation whose controls can be changed between turns."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..data.rendering import render_prompt
from . import terminal as show
from .decoding import as_utf8, context_of, decoding_options, objective_tensor
from .errors import UserError, argument
from .generation_options import STRENGTH, WEIGHTS
from .models import check_heads, load, quiet_transformers
from .reply import Reply, ReplyStream, print_gate, write_reply

Message = dict[str, str]

# Command -> (its argument, what it does).
COMMANDS = {
    "/system": ("[TEXT]", "set the system message; without a text, show it; none removes it"),
    "/strength": ("[S]", "set the strength of the steering; 0 is the backbone"),
    "/objective": ("[W,...]", "set one weight for each objective of the heads"),
    "/alpha": ("[on|off]", "show the alpha of each token"),
    "/compare": ("", "show the backbone's reply to the last message beside the gated one"),
    "/reset": ("", "forget the conversation; the settings stay"),
    "/save": ("FILE", "save the conversation, as JSON if FILE ends in .json, else as text"),
    "/help": ("", "show this list"),
    "/quit": ("", "end the chat; so does Ctrl-D"),
}


def chat(arguments: Namespace) -> int:
    """Chat until the input ends. Returns 130 after Ctrl-C if standard input is not a terminal."""
    check_heads(arguments)
    with argument():
        to = show.console(arguments.color)
        quiet_transformers(arguments.backbone)
    model, tokenizer = load(arguments)
    options = decoding_options(arguments, model)
    talk = Chat(model, tokenizer, to, options, arguments.system, arguments.seed)
    talk.shows_alpha = arguments.show_gate
    talk.check_system()
    if sys.stdin.isatty():
        to.out(f"{arguments.heads}: {talk.settings()}. /help lists the commands, Ctrl-D ends.")
    with talk.interrupts():
        for line in _lines(to):
            if line is None:  # Ctrl-C while no reply is being written
                if not sys.stdin.isatty():
                    return 128 + signal.SIGINT
                to.out("\n(Ctrl-D or /quit ends the chat)")
            elif not talk.take(line.strip()):
                break
    return 0


def _lines(to: Any) -> Iterator[str | None]:
    """What the user types, line by line; None for Ctrl-C."""
    terminal = sys.stdin.isatty()
    if terminal and importlib.util.find_spec("readline"):
        import readline

        readline.set_completer_delims("\n")
        readline.set_completer(_complete)
        readline.parse_and_bind("tab: complete")
    while True:
        try:
            if terminal:
                yield input("> ")
            elif line := sys.stdin.readline():
                yield line
            else:
                return
        except EOFError:
            to.out("")
            return
        except UnicodeDecodeError:
            raise UserError("standard input: expected UTF-8 text, got other bytes") from None
        except KeyboardInterrupt:
            yield None


def _complete(text: str, number: int) -> str | None:
    found = [name for name in COMMANDS if text.startswith("/") and name.startswith(text)]
    return found[number] if number < len(found) else None


class Chat:
    """A conversation with a gated model.

    Args:
        model: a `DualHeadForCausalLM`. tokenizer: its tokenizer.
        to: the console.
        options: of ``generate``; strength and objective_weights can change between turns.
        system: the system message, or None.
        seed: seed of sampling. Turn n uses seed + n, so /compare shows the same reply again.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        to: Any,
        options: dict[str, Any],
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.to = model, tokenizer, to
        self.options, self.system, self.seed = options, system, seed
        self.messages: list[Message] = []
        self.shows_alpha = False
        self._settings: list[str] = []  # of each reply
        self._stream: ReplyStream | None = None
        self._left_out = 0  # messages that no longer fit the context
        self._saved: set[str] = set()

    # --- the user's side ---

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Ctrl-C stops a reply that is being written; otherwise it is a KeyboardInterrupt."""

        def handle(signum: int, frame: Any) -> None:
            if self._stream is None:
                raise KeyboardInterrupt
            self._stream.stopped = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def take(self, line: str) -> bool:
        """Answer a line, or run its command. Returns False if the chat is over."""
        if not line:
            return True
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        try:
            if not line.startswith("/"):
                with argument():
                    line = as_utf8(line)
                self._answer(line)
            elif name in COMMANDS:
                getattr(self, f"_{name[1:]}")(rest.strip())
            else:
                near = difflib.get_close_matches(name, [*COMMANDS, "/exit"], 1)
                hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
                raise UserError(f"{name}: no such command; {hint}")
        except KeyboardInterrupt:  # before the model has begun to write
            self.to.out("\n(stopped)")
        except UserError as error:
            self.to.file.flush()
            print(f"dualhead chat: {error}", file=sys.stderr, flush=True)
        return True

    def settings(self) -> str:
        """The settings that commands change, in words."""
        words = f"strength {self.options.get('strength', 1.0):g}"
        weights = self.options.get("objective_weights")
        if weights is not None:
            words += f", objectives {','.join(f'{w:g}' for w in weights.tolist())}"
        return words

    def check_system(self) -> None:
        """Raise UserError if the chat template does not support a system message."""
        if self.system is not None:
            with argument():
                self.system = as_utf8(self.system)
            self._prompt([{"role": "user", "content": "?"}])

    # --- the model's side ---

    def _prompt(self, messages: list[Message]) -> Any:
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        errors: tuple = (ValueError, TypeError)
        if importlib.util.find_spec("jinja2"):
            from jinja2 import TemplateError

            errors += (TemplateError,)
        try:
            text, templated = render_prompt([*before, *messages], self.tokenizer)
        except errors as error:
            what = "a system message" if before else "this conversation"
            raise UserError(f"the model's chat template does not take {what}: {error}") from error
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=not templated)

    def _inputs(self, messages: list[Message]) -> tuple[Any, int]:
        """(tokens of the conversation, how many new tokens fit). The oldest turns are left out if
        the conversation no longer fits.
        """
        context, wanted = context_of(self.model), self.options["max_new_tokens"]
        for first in range(0, len(messages), 2):
            inputs = self._prompt(messages[first:])
            length = inputs["input_ids"].shape[1]
            if context is None or length + wanted <= context:
                break
        room = wanted if context is None else min(wanted, context - length)
        if room < 1:
            raise UserError(
                f"the message has {length} tokens with its template, and the model a context of "
                f"{context}"
            )
        if first > self._left_out:
            self.to.out(
                f"(the first {first} messages no longer fit the context of {context} tokens)"
            )
        self._left_out = first
        return inputs.to(self.model.device), room

    def _write(self, messages: list[Message], print: Any = None, **changes: Any) -> Reply:
        import torch

        inputs, room = self._inputs(messages)
        torch.manual_seed((self.seed + len(messages) // 2) % 2**64)
        options = self.options | changes | {"max_new_tokens": room}

        def started(stream: ReplyStream) -> None:
            self._stream = stream

        try:
            return write_reply(
                self.model,
                self.tokenizer,
                inputs,
                options,
                strip=True,
                print=print,
                started=started,
            )
        finally:
            self._stream = None

    def _answer(self, message: str) -> None:
        messages = [*self.messages, {"role": "user", "content": message}]
        streamed = not self.shows_alpha or self.to.file.isatty()
        print = (lambda text: show.print_text(self.to, text)) if streamed else None
        reply = self._write(messages, print)
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        self._settings.append(self.settings())
        if self.shows_alpha and reply.tokens:
            print_gate(self.to, reply, streamed)
        else:
            show.print_text(self.to, "\n")
        if reply.stopped:
            self.to.out("(stopped)")
        elif not reply.tokens:
            self.to.out("(the reply is empty)")
        elif not reply.ended:
            self.to.out("(cut off; --max-new-tokens allows longer replies)")
        self.to.out("")

    # --- commands ---

    def _system(self, text: str) -> None:
        before = self.system
        if text:
            self.system = None if text.lower() == "none" else text
            try:
                self.check_system()
            except UserError:
                self.system = before
                raise
        self.to.out(f"system message: {'none' if self.system is None else self.system}")

    def _strength(self, text: str) -> None:
        if text:
            self.options = self.options | {"strength": _parsed("/strength", STRENGTH, text)}
        self.to.out(self.settings())

    def _objective(self, text: str) -> None:
        if text:
            weights = _parsed("/objective", WEIGHTS, text)
            tensor = objective_tensor("/objective", weights, self.model)
            self.options = self.options | {"objective_weights": tensor}
        self.to.out(self.settings())

    def _alpha(self, text: str) -> None:
        if text not in ("", "on", "off"):
            raise UserError(f"/alpha: expected on or off, got {text!r}")
        self.shows_alpha = text == "on" if text else not self.shows_alpha
        self.to.out(f"alpha of each token: {'shown' if self.shows_alpha else 'not shown'}")

    def _compare(self, text: str) -> None:
        _no_argument("/compare", text)
        if not self.messages:
            raise UserError("/compare: expected a message before it, got none")
        from rich.table import Table
        from rich.text import Text

        messages, texts = self.messages[:-1], []
        with self.to.status("writing both replies ..."):
            for strength in (0.0, self.options.get("strength", 1.0)):
                reply = self._write(messages, strength=strength)
                if reply.stopped:
                    self.to.out("(stopped)")
                    return
                texts.append(show.printable(reply.text))
        table = Table("backbone", self.settings(), show_lines=True, expand=False)
        table.add_row(*map(Text, texts))
        # The console wraps softly, which would cut a table at its right edge.
        self.to.print(table, soft_wrap=False)
        if texts[0] == texts[1]:
            self.to.out("(both replies are the same)")

    def _reset(self, text: str) -> None:
        _no_argument("/reset", text)
        self.messages, self._settings, self._left_out = [], [], 0
        self.to.out(f"a new conversation; {self.settings()}")

    def _save(self, path: str) -> None:
        if not path:
            raise UserError("/save: expected a file, got none")
        if not self.messages:
            raise UserError("/save: expected a conversation, got none yet")
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        if path.endswith(".json"):
            record = {"messages": [*before, *self.messages], "settings": self._settings}
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "\n\n".join(f"{m['role']}: {m['content']}" for m in (*before, *self.messages))
            text += "\n"
        try:
            # Only files that this chat has written are overwritten.
            mode = "w" if os.path.realpath(path) in self._saved else "x"
            with open(path, mode, encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"/save: expected a new file, but {path} exists") from None
        except (OSError, ValueError) as error:
            raise UserError(f"/save: {error}") from error
        self._saved.add(os.path.realpath(path))
        self.to.out(f"{len(self.messages)} messages in {path}")

    def _help(self, text: str) -> None:
        for name, (takes, does) in COMMANDS.items():
            self.to.out(f"{f'{name} {takes}':22} {does}")
        self.to.out("Ctrl-C stops a reply.")


def _parsed(name: str, kind: Any, text: str) -> Any:
    from argparse import ArgumentTypeError

    try:
        return kind(text)
    except ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None


def _no_argument(name: str, text: str) -> None:
    if text:
        raise UserError(f"{name}: expected nothing after it, got {text!r}")
