# SPDX-License-Identifier: Apache-2.0
"""The command line: ``dualhead train | generate | chat | inspect | sample | ...``.

This module has the parser and the error handling. The commands are in `commands`, which imports
torch and transformers only when they are needed. A user error is one sentence on standard error and
exit code 2; any other failure is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from .. import __version__
from . import commands
from .errors import UserError
from .options import OPTIONS, OVERVIEW
from .train_config import config_file, config_words

EXIT_USER_ERROR = 2
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        hint = _did_you_mean(message)
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {' '.join(message.split())}{hint}\n")


def _did_you_mean(message: str) -> str:
    """A hint after argparse's "invalid choice: 'trian' (choose from 'train', ...)"."""
    found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if found is None:
        return ""
    near = difflib.get_close_matches(found[1], re.findall(r"[\w.-]+", found[2]), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``dualhead``; imports neither torch nor transformers."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="dualhead",
        description="A reward head and a gate beside a frozen language model's own head.",
        epilog=OVERVIEW,
        formatter_class=layout,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dualhead_ext {__version__}")
    parsers = parser.add_subparsers(
        dest="command", required=True, metavar="command", parser_class=_Parser
    )
    for name, (add_options, text, examples) in OPTIONS.items():
        sub = parsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=examples,
            formatter_class=layout,
            allow_abbrev=False,
        )
        add_options(sub)
        sub.add_argument(
            "--traceback", action="store_true", help="show the traceback of user errors too"
        )
    return parser


def _with_config(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words of a command, preceded by those of the file in ``train --config FILE``."""
    if words[:1] != ["train"] or (path := config_file(words[1:])) is None:
        return words
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return ["train", *config_words(path, commands.choices["train"]), *words[1:]]


def _before_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of ``serve`` before ``--``, and those after it, which are for vLLM. argparse would
    take the latter only where no option follows the heads.
    """
    if words[:1] != ["serve"] or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


class _Interrupts:
    """Raises KeyboardInterrupt at the first Ctrl-C and SystemExit at the first SIGTERM, so that
    files are closed, and remembers them: an import may turn either into another error.
    """

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum in self.seen:  # a second one must not interrupt the handling of the first
            return
        self.seen.append(signum)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    def __exit__(self, *error: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if number in self.seen else before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; default ``sys.argv[1:]``.
    Returns:
        0, or the command's exit code; 2 after a user error; 130 after Ctrl-C; 143 after SIGTERM;
        141 if the reader of the output has closed it.
    Raises:
        SystemExit: after ``--help``, and for arguments that cannot be parsed (code 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as Python does it for standard error
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    with _Interrupts() as interrupts:
        try:
            own, for_vllm = _before_dashes(words)
            arguments = parser.parse_args(_with_config(own, parser))
            if arguments.command == "serve":
                arguments.vllm_options = for_vllm
            arguments.argv, arguments.parser = words, parser
            code = commands.COMMANDS[arguments.command](arguments)
            sys.stdout.flush()
            return code or 0
        except UserError as error:
            if interrupts.seen:
                return 128 + interrupts.seen[0]
            if "--traceback" in words:
                raise
            print(f"dualhead {words[0]}: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except BrokenPipeError:
            # Python flushes standard output again when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except BaseException:
            if interrupts.seen:
                return 128 + interrupts.seen[0]
            raise


if __name__ == "__main__":
    sys.exit(main())
