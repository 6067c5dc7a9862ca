# SPDX-License-Identifier: Apache-2.0
"""A griffe extension that converts reStructuredText in docstrings to Markdown: roles
(``:func:`name```) become code, and ``::`` before an indented block becomes ``:``.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?\.?([^`]*)`")


class Roles(Extension):
    """Rewrites each docstring after it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = text.replace("::\n\n", ":\n\n")
