# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of training steps runs: backbones and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a step may take with a 7B backbone, as a factor of the backbone's own forward pass.
ALLOWED_7B = 1.1


@dataclass(frozen=True)
class TrainingCase:
    """A backbone and a batch.

    Attributes:
        name: for tables.
        build: makes the backbone on a device of this type, in bf16.
        pairs: P, of rows of ``prompt_tokens`` and then ``response_tokens``.
        allowed: the most that a step may take, as a factor of ``forward``; None: it is measured
            only.
    """

    name: str
    build: Callable[[str], PreTrainedModel]
    pairs: int = 8
    prompt_tokens: int = 256
    response_tokens: int = 256
    allowed: float | None = None

    @property
    def tokens(self) -> int:
        """Of a batch, prompts and responses."""
        return 2 * self.pairs * (self.prompt_tokens + self.response_tokens)


def tiny_case() -> TrainingCase:
    """For tests of the harness."""
    return TrainingCase("random Llama, 0.2M", models.TINY.build, 2, 5, 6)


def plan(quick: bool = False) -> list[TrainingCase]:
    """The cases to run."""
    if quick:
        return [TrainingCase("random Llama, 0.2M", models.TINY.build, 2, 32, 32)]
    return [TrainingCase("random Llama, 92M", models.MEDIUM.build, 2, 128, 128)]


def gpu_plan(quick: bool = False) -> list[TrainingCase]:
    """The cases to run on a GPU: batches of 8192 tokens at the size of 7B models."""
    if quick:
        return [TrainingCase("random Llama, 1.1B", models.LLAMA_1B.build, 4)]
    return [TrainingCase("random Llama, 6.7B", models.LLAMA_7B.build, allowed=ALLOWED_7B)]
