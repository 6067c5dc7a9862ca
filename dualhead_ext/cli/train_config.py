# SPDX-License-Identifier: Apache-2.0
"""``dualhead train --config FILE.yaml``: the options of the command line in a file.

A key is the name of an option ("learning-rate" or "learning_rate"), or a field of
DualHeadTrainingArguments, as for ``--set``. The file is converted to words that precede those of
the command line. So both are checked by the same rules, and the command line wins.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any

from .errors import UserError, argument, one_line

_NO_KEYS = ("config", "help", "traceback", "set", "command")


def config_file(argv: Sequence[str]) -> str | None:
    """The value of ``--config`` among the words of the command, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        return parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # the command's own parser reports it
        return None


def config_words(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A file's options as words for ``parser``, the parser of ``dualhead train``.

    Raises:
        UserError: the file cannot be read, is not a YAML mapping, or has an unknown key or an
            unsuitable value.
    """
    options = {}
    for action in parser._actions:
        for name in (action.dest, *(s.lstrip("-") for s in action.option_strings)):
            if action.option_strings and action.dest not in _NO_KEYS:
                options[name.replace("-", "_")] = action
    values = {key.replace("-", "_"): value for key, value in _read(path).items()}
    if others := [key for key in values if key not in options]:
        _check_fields(path, others, list(options))
    words: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        if key not in options:
            words += ["--set", f"{key}={_as_json(path, key, value)}"]
            continue
        action = options[key]
        option = next(s for s in action.option_strings if s.startswith("--"))
        if isinstance(value, bool) and action.nargs in (0, "?"):
            words += [option] if value else []
        elif isinstance(value, (list, dict, bool)) or action.nargs == 0:
            expected = "true or false" if action.nargs == 0 else "one value"
            raise UserError(f"--config: {path}: {key}: expected {expected}, got {value!r}")
        else:
            words.append(f"{option}={value}")
    return words


def _as_json(path: str, key: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:  # a date, a list that holds itself
        raise UserError(
            f"--config: {path}: {key}: expected text, numbers, lists or mappings of them, got "
            f"a {type(value).__name__} ({one_line(error)})"
        ) from error


def _read(path: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UserError(
            "--config: the package PyYAML is not installed; install it with: pip install "
            "'dualhead_ext[train]'"
        ) from error
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(
            f"--config: {path}: expected names of options and their values, got a "
            f"{type(values).__name__}"
        )
    return values


def _check_fields(path: str, names: list[str], options: list[str]) -> None:
    """Raise UserError for names that are not fields of DualHeadTrainingArguments. Imports
    transformers.
    """
    from dataclasses import fields

    with argument():
        from ..train.arguments import DualHeadTrainingArguments

    known = [f.name for f in fields(DualHeadTrainingArguments) if f.init]
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    hints = []
    for name in unknown:
        near = difflib.get_close_matches(name, [*options, *known], n=1)
        hints.append(f"{name} (did you mean {near[0]}?)" if near else name)
    raise UserError(f"--config: {path}: unknown: {', '.join(hints)}")
