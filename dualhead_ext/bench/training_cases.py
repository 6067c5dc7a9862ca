# SPDX-License-Identifier: Apache-2.0
"""The cases of the training step benchmark: backbones and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Upper limit of a step with a 7B backbone, as a multiple of the backbone's forward pass.
ALLOWED_7B = 1.1


@dataclass(frozen=True)
class TrainingCase:
    """A backbone and a batch.

    Attributes:
        name: name in tables.
        build: makes the backbone on a device of the given type, in bf16.
        pairs: P; each row has ``prompt_tokens`` followed by ``response_tokens`` tokens.
        allowed: upper limit of a step's time, as a multiple of ``forward``; None if there is none.
    """

    name: str
    build: Callable[[str], PreTrainedModel]
    pairs: int = 8
    prompt_tokens: int = 256
    response_tokens: int = 256
    allowed: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a batch, prompts and responses together."""
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
