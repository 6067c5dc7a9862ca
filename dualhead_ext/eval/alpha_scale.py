# SPDX-License-Identifier: Apache-2.0
"""The display of alpha: its range in a text, divided into levels with a colour and a number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Level -> (index in the palette of 256 colours, the same colour as #rrggbb). From blue over light
# grey to orange: distinct for colour-blind readers, and light enough for black letters.
COLORS = (
    (69, "#5f87ff"),
    (111, "#87afff"),
    (153, "#afd7ff"),
    (189, "#d7d7ff"),
    (255, "#eeeeee"),
    (223, "#ffd7af"),
    (215, "#ffaf5f"),
    (208, "#ff8700"),
    (202, "#ff5f00"),
)
# Level -> a style of the 16 colours that every terminal has.
STYLES_16 = (
    "bright_white on blue",
    "black on cyan",
    "black on white",
    "black on yellow",
    "bright_white on red",
)


@dataclass(frozen=True)
class AlphaScale:
    """The range of alpha from ``low`` to ``high``, both finite, low <= high."""

    low: float
    high: float

    @classmethod
    def of(cls, alphas: Iterable[float | None]) -> AlphaScale | None:
        """The range of the values that are finite numbers; None if there are none."""
        known = [a for a in alphas if a is not None and math.isfinite(a)]
        return cls(min(known), max(known)) if known else None

    @property
    def span(self) -> float:
        """high - low."""
        return self.high - self.low

    @property
    def flat(self) -> bool:
        """Whether all values are equal up to rounding."""
        return self.span < 5e-5

    @property
    def decimals(self) -> int:
        """The decimals, 2 to 4, that distinguish values in this range."""
        if self.flat:
            return 4 if 0 < abs(self.high) < 0.05 else 2
        return min(4, max(2, math.ceil(-math.log10(self.span / 10))))

    def number(self, alpha: float) -> str:
        """alpha with as many digits as the range needs."""
        return f"{alpha:.{self.decimals}f}"

    def level(self, alpha: float, count: int) -> int:
        """The index of alpha among ``count`` equal parts of the range; the middle one if the range
        is a single value.
        """
        if self.flat:
            return count // 2
        share = (alpha - self.low) / self.span
        return min(max(int(share * count), 0), count - 1)

    def middle(self, level: int, count: int) -> float:
        """The value in the middle of a level."""
        return self.low + (level + 0.5) / count * self.span

    def hex_color(self, alpha: float) -> str:
        """The colour of alpha as ``"#rrggbb"``."""
        return COLORS[self.level(alpha, len(COLORS))][1]
