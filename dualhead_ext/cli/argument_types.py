# SPDX-License-Identifier: Apache-2.0
"""argparse types of options, and options that several commands share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from .terminal import COLOR_NAMES

# The largest seed that all generators accept: NumPy's.
MAX_SEED = 2**32 - 1


def number(
    kind: type = float, low: float = -math.inf, high: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number in [low, high]. The error states the range."""
    noun = "a whole number" if kind is int else "a number"
    if low == -math.inf and high == math.inf:
        expected = noun
    elif high == math.inf:
        expected = f"{noun} of at least {low:g}"
    elif kind is int:
        expected = f"{noun} in [{low}, {high}]"
    else:
        expected = f"{noun} in [{low:g}, {high:g}]"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def numbers(text: str) -> list[float]:
    """An argparse type: comma-separated finite numbers."""
    try:
        return [number()(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, got {text!r}"
        ) from None


def key_value(text: str) -> tuple[str, str]:
    """An argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def device(text: str) -> str:
    """An argparse type: auto, cpu, cuda or cuda:N. Whether the device exists is checked later."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def names(text: str) -> list[str]:
    """An argparse type: comma-separated words."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_color(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--color",
        choices=COLOR_NAMES,
        default="auto",
        help="default: auto, according to the terminal and NO_COLOR",
    )


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", type=device, default="auto", help="auto (default), cpu, cuda or cuda:N"
    )
