# SPDX-License-Identifier: Apache-2.0
"""``dualhead export``: writes heads and their backbone as a folder for vLLM."""

from __future__ import annotations

from argparse import Namespace

from .errors import argument
from .models import check_heads, quiet_transformers


def export(arguments: Namespace) -> None:
    """Write the folder and print the command that serves it."""
    check_heads(arguments)
    with argument():
        quiet_transformers(arguments.backbone)
        from ..model.export import export as write

        folder = write(arguments.heads, arguments.output, arguments.backbone)
    print(f"{folder} is ready: dualhead serve {folder}")
