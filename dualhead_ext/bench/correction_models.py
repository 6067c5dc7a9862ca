# SPDX-License-Identifier: Apache-2.0
"""Greedy ``generate()`` of whole models: the plain backbone against the backbone with a gated head.

Contenders, which share the backbone's weights:

- ``plain``: the backbone in transformers' own loop.
- ``default``: the default reward head and gate of ``from_backbone``, with nonzero weights.
- ``full``: a full reward head (its own V x d matrix) and the attention gate.
- ``full int8``: the same with both heads quantised. The plain model's LM head is not.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from ..config import DEFAULT_HEAD
from ..measurement.timing import Contender, alternate
from . import models
from .cases import FORMATS
from .comparisons import Comparison, Contest, times

# The share of the plain model's tokens per second that each gated model must reach, by batch size.
SPEEDS = {
    "default": {1: 0.99, 8: 0.99, 32: 0.99},
    "full": {1: 0.92, 8: 0.95, 32: 0.95},
    "full int8": {1: 1.0, 8: 1.0, 32: 1.0},
}
_FULL = {"reward_head": "full", "gate": "attention"}
HEADS: dict[str, dict[str, Any]] = {"default": {}, "full": _FULL, "full int8": _FULL}
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class ModelCase:
    """A random Llama, and how much of ``generate()`` is timed.

    Attributes:
        name: name in tables.
        llama: shape of the model.
        format: format of all weights.
        batches: (batch size, number of tokens to generate) of each contest.
        min_rounds: minimum number of calls of each contender.
        judged: whether the ratios are compared with `SPEEDS`.
    """

    name: str
    llama: models.Llama
    format: str
    batches: tuple[tuple[int, int], ...]
    min_rounds: int = 15
    judged: bool = True


def plan(quick: bool = False) -> list[ModelCase]:
    """The cases to run. Larger batches generate fewer tokens: a processor without bf16 arithmetic
    takes a minute for 32 tokens of 32 requests.
    """
    if quick:
        return [ModelCase("tiny", models.TINY, "bf16", ((1, 4),), 2, judged=False)]
    shapes = (
        ("135M-shaped", models.SMOLLM2_135M, ("fp32", "bf16"), ((1, 32), (8, 32), (32, 16)), 15),
        ("1B-shaped", models.LLAMA_1B, ("bf16",), ((1, 16), (8, 8), (32, 4)), 7),
    )
    return [
        ModelCase(name, llama, format_, batches, rounds)
        for name, llama, formats, batches, rounds in shapes
        for format_ in formats
    ]


def gated(plain: Any, **fields: Any) -> Any:
    """A twin of the model with a gated head whose reward head and gate have nonzero weights."""
    from ..model.causal_lm import DualHeadForCausalLM

    model = DualHeadForCausalLM.from_backbone(models.twin(plain), **fields)
    head = model.lm_head_module
    with torch.no_grad():
        for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def run_case(case: ModelCase, *, seconds: float) -> Iterator[Contest]:
    """Time ``generate()`` for each batch size in turn.

    Raises:
        RuntimeError: there is no compiled kernel to time, or a contender stopped early.
    """
    if not ops.kernel_for("cpu", FORMATS[case.format]):
        raise RuntimeError(f"benchmark: no compiled CPU kernel for {case.format} to time")
    plain = case.llama.build(dtype=FORMATS[case.format]).eval()
    plain.generation_config.eos_token_id = None
    systems = {"plain": plain} | {name: gated(plain, **fields) for name, fields in HEADS.items()}
    systems["full int8"].quantize("int8")
    for batch, tokens in case.batches:
        yield _contest(case, systems, batch, tokens, seconds)


def _contest(
    case: ModelCase, systems: dict[str, Any], batch: int, tokens: int, seconds: float
) -> Contest:
    prompt = torch.randint(0, case.llama.vocabulary, (batch, _PROMPT_TOKENS))

    def contender(name: str) -> Contender:
        def call(copy: int) -> None:
            made = systems[name].generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
            if made.shape != (batch, _PROMPT_TOKENS + tokens):
                raise RuntimeError(f"benchmark: {case.name} made {tuple(made.shape)} tokens")

        # The timer disables garbage collection: free the last call's cache here.
        return Contender(name, call, lambda copy: gc.collect())

    timings = alternate(
        [contender(name) for name in systems],
        seconds=seconds,
        min_rounds=case.min_rounds,
        warmup=1,
    )
    comparisons = {
        name: [
            Comparison.of_times(
                timings[name], timings["plain"], 1 / SPEEDS[name][batch] if case.judged else None
            )
        ]
        for name in HEADS
    }
    figures = {
        name: row | {"tokens_per_s_median": batch * tokens / row["us_median"] * 1e6}
        for name, row in times(timings).items()
    }
    figures["default"] |= DEFAULT_HEAD
    setting = {
        "model": case.name,
        "format": case.format,
        "B": batch,
        "prompt_tokens": _PROMPT_TOKENS,
        "new_tokens": tokens,
    }
    return Contest("model", setting, figures, comparisons)
