# SPDX-License-Identifier: Apache-2.0
"""``dualhead completion SHELL``: a script for the shell that completes commands, options, choices
and paths. shtab, the extra ``completion``, writes it from the parser.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from .errors import UserError

SHELLS = ("bash", "zsh", "fish", "tcsh")
EXAMPLES = """\
examples:
  source <(dualhead completion bash)              for this shell; add it to ~/.bashrc for all
  dualhead completion zsh > ~/.zfunc/_dualhead    use a folder in $fpath
  dualhead completion fish > ~/.config/fish/completions/dualhead.fish
  dualhead completion tcsh > ~/.dualhead.tcsh; source ~/.dualhead.tcsh"""
# Arguments that take a path, whatever their metavar is.
_PATHS = ("heads", "backbone", "data", "eval_data", "output", "out", "resume", "cache_hidden")
_PATH_METAVARS = ("FILE", "DIR")


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dualhead completion``."""
    parser.add_argument("shell", choices=SHELLS)


def completion(arguments: Namespace) -> None:
    """Print the script."""
    try:
        import shtab
    except ImportError as error:
        raise UserError(
            "the package shtab is not installed; install it with: pip install "
            "'dualhead_ext[completion]'"
        ) from error
    parser: argparse.ArgumentParser = arguments.parser
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in _PATHS or action.metavar in _PATH_METAVARS:
                action.complete = shtab.FILE
    print(shtab.complete(parser, arguments.shell))
