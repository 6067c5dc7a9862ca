# SPDX-License-Identifier: Apache-2.0
"""The cases of the training loss benchmark: batches, and the gradients to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cases import FORMATS

# Optional gradients; the gate's is always computed.
GRADIENTS = ("reward", "lm", "hidden")
LARGEST = (1024, 32000)


@dataclass(frozen=True)
class LossCase:
    """A batch of response tokens, and the gradients to compute.

    Attributes:
        d, V, format: sizes and format. "bf16": hidden states and frozen weights in bf16, trained
            weights in fp32, under autocast.
        tokens: number of tokens in all rows together; all are response tokens.
        pairs: P; half of the tokens are chosen and half rejected. 0 with ``sequences``.
        compile: whether the torch.compile contender takes part.
        sequences: number of rows for the language model term alone, instead of pairs: every token
            needs the products of both heads.
        gradients: names from :data:`GRADIENTS`, in addition to the gate's gradient.
        objectives: K; the pairs use the reward heads in turn.
        packed: whether rows have different lengths, from one half to three halves of their mean,
            and are concatenated into a single row.
    Raises:
        ValueError: both or neither of pairs and sequences, tokens not divisible by the number of
            rows, or an unknown gradient.
    """

    d: int
    V: int
    format: str
    tokens: int = 2048
    pairs: int = 8
    compile: bool = True
    sequences: int = 0
    gradients: tuple[str, ...] = ("reward",)
    objectives: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        if bool(self.pairs) == bool(self.sequences):
            raise ValueError(
                "LossCase: a batch is of pairs or of sequences, "
                f"got {self.pairs} pairs and {self.sequences} sequences"
            )
        if self.tokens % self.rows:
            raise ValueError(f"LossCase: tokens must fill {self.rows} rows, got {self.tokens}")
        if unknown := set(self.gradients) - set(GRADIENTS):
            raise ValueError(f"LossCase: gradients must be of {GRADIENTS}, got {sorted(unknown)}")

    @property
    def rows(self) -> int:
        """R: 2P [all chosen; all rejected], or the number of sequences."""
        return 2 * self.pairs + self.sequences

    @property
    def lm_tokens(self) -> int:
        """Number of tokens of the language model term; they come first."""
        return self.tokens // 2 if self.pairs else self.tokens

    def lengths(self) -> list[int]:
        """Number of tokens of each row (R,). Packed: the lengths of chosen responses grow from half
        the mean to three halves and those of rejected ones shrink, so each side has half of the
        tokens."""
        mean, side = self.tokens // self.rows, self.pairs or self.sequences
        if not self.packed:
            return [mean] * self.rows
        offsets = [int((2 * i + 1 - side) * mean / (2 * side)) for i in range(side)]
        growing = [mean + offset for offset in offsets]
        return growing + growing[::-1] if self.pairs else growing

    def settings(self) -> dict:
        """The parameters that identify the case in results files."""
        return {
            "format": self.format,
            "d": self.d,
            "V": self.V,
            "tokens": self.tokens,
            "pairs": self.pairs,
            "gradients": list(self.gradients),
            "objectives": self.objectives,
            "packed": self.packed,
        }

    def __str__(self) -> str:
        return f"{self.d}x{self.V}-{self.format}"


def plan(quick: bool = False) -> list[LossCase]:
    """The cases to run; the quick plan has a single small one."""
    if quick:
        return [LossCase(256, 4096, "fp32", tokens=512)]
    return [LossCase(d, V, name) for d, V in ((256, 4096), LARGEST) for name in FORMATS]


def gpu_plan(quick: bool = False) -> list[LossCase]:
    """The cases to run on a GPU: 8192 response tokens at the sizes of 7B and 8B models."""
    if quick:
        return [LossCase(256, 4096, "bf16", tokens=512, compile=False)]
    return [LossCase(4096, V, "bf16", tokens=8192, pairs=32) for V in (32000, 128256)]


def gpu_variants(quick: bool = False) -> list[LossCase]:
    """Additional GPU cases of ``--part loss``: six products per token (forward and both gradients
    of two heads), four products per token, a pair longer than the loss's workspace, packed rows,
    two objectives."""
    d, V, tokens, pairs = (256, 4096, 512, 8) if quick else (4096, 32000, 8192, 32)
    size: dict[str, Any] = {
        "d": d,
        "V": V,
        "format": "bf16",
        "tokens": tokens,
        "compile": not quick,
    }
    all_in_lm: dict[str, Any] = {"pairs": 0, "sequences": 2 * pairs}
    return [
        LossCase(**size, **all_in_lm, gradients=("reward", "lm", "hidden")),
        LossCase(**size, **all_in_lm, gradients=("reward", "lm")),
        LossCase(**size, pairs=1),
        LossCase(**size, pairs=pairs, packed=True),
        LossCase(**size, pairs=pairs, objectives=2),
    ]
