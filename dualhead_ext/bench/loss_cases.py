# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of the training loss runs: batches, and which gradients are wanted of them."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import FORMATS

# Beside the gate's, which is always wanted.
GRADIENTS = ("reward", "lm", "hidden")
LARGEST = (1024, 32000)


@dataclass(frozen=True)
class LossCase:
    """A batch of response tokens, and what is wanted of it.

    Attributes:
        d, V, format: sizes; "bf16": hidden states and frozen weights in bf16, trained ones in fp32
            under autocast.
        tokens: of all rows together, all of them response tokens.
        pairs: P, half of the tokens chosen and half rejected; 0 with ``sequences``.
        compile: whether the torch.compile contender takes part.
        sequences: rows for the language model term alone, in the place of pairs: every token takes
            both heads' products.
        gradients: of :data:`GRADIENTS`, beside the gate's.
        objectives: K reward heads; the pairs take turns with them.
        packed: rows of lengths between one half and three halves of their mean, which the model
            hands to the loss one after the other in a single row.
    Raises:
        ValueError: pairs and sequences together or neither, tokens that rows do not divide, an
            unknown gradient.
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
        """R = 2P [all chosen; all rejected], or the sequences."""
        return 2 * self.pairs + self.sequences

    @property
    def lm_tokens(self) -> int:
        """Tokens of the language model term, which come first."""
        return self.tokens // 2 if self.pairs else self.tokens

    def lengths(self) -> list[int]:
        """Tokens of each row (R,). Packed: chosen responses grow from half the mean to three
        halves, rejected ones shrink, so that each half has half of the tokens."""
        mean, side = self.tokens // self.rows, self.pairs or self.sequences
        if not self.packed:
            return [mean] * self.rows
        offsets = [int((2 * i + 1 - side) * mean / (2 * side)) for i in range(side)]
        growing = [mean + offset for offset in offsets]
        return growing + growing[::-1] if self.pairs else growing

    def settings(self) -> dict:
        """What tells the case from others in results files."""
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
    """The cases to run; the quick plan's is small."""
    if quick:
        return [LossCase(256, 4096, "fp32", tokens=512)]
    return [LossCase(d, V, name) for d, V in ((256, 4096), LARGEST) for name in FORMATS]


def gpu_plan(quick: bool = False) -> list[LossCase]:
    """The cases to run on a GPU: 8192 response tokens at the sizes of 7B and 8B models."""
    if quick:
        return [LossCase(256, 4096, "bf16", tokens=512, compile=False)]
    return [LossCase(4096, V, "bf16", tokens=8192, pairs=32) for V in (32000, 128256)]


def gpu_variants(quick: bool = False) -> list[LossCase]:
    """More of them, which ``--part loss`` runs besides: six products a token (forward and both
    gradients of two heads), four of them, a pair that is longer than the loss's workspace, packed
    rows, two objectives."""
    d, V, tokens, pairs = (256, 4096, 512, 8) if quick else (4096, 32000, 8192, 32)
    size = {"d": d, "V": V, "format": "bf16", "tokens": tokens, "compile": not quick}
    all_in_lm = {"pairs": 0, "sequences": 2 * pairs}
    return [
        LossCase(**size, **all_in_lm, gradients=("reward", "lm", "hidden")),
        LossCase(**size, **all_in_lm, gradients=("reward", "lm")),
        LossCase(**size, pairs=1),
        LossCase(**size, pairs=pairs, packed=True),
        LossCase(**size, pairs=pairs, objectives=2),
    ]
