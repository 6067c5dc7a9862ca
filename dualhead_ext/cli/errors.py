# SPDX-License-Identifier: Apache-2.0
"""User errors, in one sentence each, as distinct from bugs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A user error, in one sentence: the argument, what was expected, what it got."""


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def argument(name: str | None = None, extra: str | None = None) -> Iterator[None]:
    """Turn an error of the library about a user's input into a :class:`UserError` that names the
    argument. Without ``name``, the error's message must name it. extra: of this package, with all
    that the command needs beyond "hf".

    Use it only around the reading and checking of input; a failure elsewhere is a bug.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        missing = missing_extra(error, extra)
        if missing is not None:
            raise UserError(missing) from error
        if isinstance(error, ModuleNotFoundError):
            raise
        raise UserError(f"{name}: {one_line(error)}" if name else one_line(error)) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}" if name else one_line(error)) from error


def missing_extra(error: ImportError, instead_of_hf: str | None = None) -> str | None:
    """How to install the package that an import did not find, if an extra has it. The package is
    identified by the module's name, or by a name in the library's own message.
    """
    package = (error.name or "").partition(".")[0]
    for name, extra in extras():
        said = not package and re.search(rf"\b{re.escape(name)}\b", str(error))
        if name == package or (said and not importlib.util.find_spec(name)):
            extra = instead_of_hf or extra if extra == "hf" else extra
            return (
                f"the package {name} is not installed; install it with: "
                f"pip install 'dualhead_ext[{extra}]'"
            )
    return None


def extras() -> list[tuple[str, str]]:
    """(package, extra) of all extras, in the order of this package's metadata."""
    try:
        requirements = importlib.metadata.requires("dualhead_ext") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return []
    found = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*\bextra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if match and match[1] != "dualhead_ext":
            found.append((match[1].lower().replace("-", "_"), match[2]))
    return found
