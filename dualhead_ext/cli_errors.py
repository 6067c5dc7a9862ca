# SPDX-License-Identifier: Apache-2.0
"""A user's mistakes, as one sentence each, told apart from bugs."""

from __future__ import annotations

import importlib.metadata
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
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for name, extra in extras() if name == package), None)
        if extra is None:
            raise
        raise UserError(
            f"the package {package} is not installed; install it with: "
            f"pip install 'dualhead_ext[{extra}]'"
        ) from error
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{name}: {one_line(error)}" if name else one_line(error)) from error


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
