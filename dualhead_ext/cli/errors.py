# SPDX-License-Identifier: Apache-2.0
"""A user's mistakes, as one sentence each, told apart from bugs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake of the user's, in one sentence: the argument, what was expected, what came."""


def one_line(error: BaseException) -> str:
    """The message of an exception without its line breaks; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def argument(name: str | None = None) -> Iterator[None]:
    """Turn what the library refuses about a user's input into a :class:`UserError` naming it; with
    no name, its message has to.

    To be put around the reading and checking of input alone: what fails outside is a bug.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        missing = missing_extra(error)
        if missing is not None:
            raise UserError(missing) from error
        if isinstance(error, ModuleNotFoundError):
            raise
        raise UserError(f"{name}: {one_line(error)}" if name else one_line(error)) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}" if name else one_line(error)) from error


def missing_extra(error: ImportError) -> str | None:
    """How to install what an import did not find, if one of the extras has it: by the module's
    name, or, where a library says it in its own words, by the name in them.
    """
    package = (error.name or "").partition(".")[0]
    for name, extra in extras():
        said = not package and re.search(rf"\b{re.escape(name)}\b", str(error))
        if name == package or (said and not importlib.util.find_spec(name)):
            return (
                f"the package {name} is not installed; install it with: "
                f"pip install 'dualhead_ext[{extra}]'"
            )
    return None


def extras() -> list[tuple[str, str]]:
    """(package, extra) for what the extras ask for, in the order of this package's metadata."""
    try:
        requirements = importlib.metadata.requires("dualhead_ext") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return []
    found = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*\bextra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match and match[1] != "dualhead_ext":
            found.append((match[1].lower().replace("-", "_"), match[2]))
    return found
