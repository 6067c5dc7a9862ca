# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of whole models: what a gated head adds to decoding with the backbone.

Contenders, each through ``generate()``, greedy, one request:

- ``backbone``: the plain model.
- ``dualhead``: the same with a gated head, in the fused loop (:mod:`dualhead_ext.generation`).
- ``logits``: that in transformers' own loop, which takes an argmax of the step's logits.
- ``eager``: that with the step in plain PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import ops, reference
from .timing import Contender, Timing, alternate, ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDED = Path(__file__).resolve().parents[1] / "backbone"
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Model:
    """A backbone to decode with.

    Attributes:
        name: for tables.
        build: makes it, with random weights or the embedded ones.
        new_tokens: to generate per call.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    new_tokens: int


def _llama(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def tiny_model() -> Model:
    """A random Llama of 2 layers, for tests of the harness."""
    return Model("random Llama, 0.2M", lambda: _llama(64, 2, 4, 128, 512), 4)


def medium_model() -> Model:
    """A random Llama of 92 million parameters, 41 of them in its embeddings and its head."""
    return Model("random Llama, 92M", lambda: _llama(640, 10, 10, 1792, 32000), 24)


def embedded_model() -> Model:
    """The backbone that comes with the package."""

    def build() -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(_EMBEDDED)

    return Model("embedded backbone", build, 48)


def plan(quick: bool = False) -> list[Model]:
    """The models to run; the quick plan leaves out the random one of medium size."""
    return [embedded_model()] if quick else [embedded_model(), medium_model()]


@dataclass(frozen=True)
class ModelResult:
    """Timings of whole calls of ``generate()``, by contender."""

    model: Model
    format: str
    timings: dict[str, Timing]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files have them."""

        def rate(us: float) -> float:
            return self.model.new_tokens / us * 1e6

        return [
            {
                "contender": name,
                "model": self.model.name,
                "format": self.format,
                "B": 1,
                "prompt_tokens": _PROMPT_TOKENS,
                "new_tokens": self.model.new_tokens,
                "tokens_per_s_median": rate(timing.us_median),
                "tokens_per_s_q1": rate(timing.us_q3),
                "tokens_per_s_q3": rate(timing.us_q1),
                "repeats": timing.repeats,
            }
            for name, timing in self.timings.items()
        ]

    def text(self) -> str:
        """The rows for a terminal."""
        lines = [f"\n{self.model.name}, {self.format}, greedy, B=1, {self.model.new_tokens} tokens"]
        for row, timing in zip(self.rows(), self.timings.values(), strict=True):
            against = ratio(timing, self.timings["backbone"])
            lines.append(
                f"    {row['contender']:<9} {row['tokens_per_s_median']:>8.1f} tokens/s "
                f"({row['tokens_per_s_q1']:.1f}..{row['tokens_per_s_q3']:.1f}), "
                f"{against.value:.2f} times the backbone's time, n = {row['repeats']}"
            )
        return "\n".join(lines)


def _decode_with(head: Any, step: Callable[..., reference.DecodeOutput]) -> None:
    """Let this one head use ``step``, whatever kernel there is."""
    head._decode_function = lambda *arguments: step


def run_model(model: Model, *, seconds: float, min_rounds: int = 5) -> ModelResult:
    """Time ``generate()`` of one model with and without the gated head.

    Args:
        seconds, min_rounds: as in :func:`~dualhead_ext.bench.timing.alternate`.
    Raises:
        RuntimeError: there is no compiled kernel to time, or a contender stopped early.
    """
    from ..modeling import DualHeadForCausalLM

    plain = model.build().eval()
    plain.generation_config.eos_token_id = None  # min_new_tokens would need logits
    gated = DualHeadForCausalLM.from_backbone(copy.deepcopy(plain)).eval()
    if not ops.kernel_for("cpu", plain.dtype):
        raise RuntimeError(f"benchmark: no compiled CPU kernel for {plain.dtype} to time")
    prompt = torch.randint(0, plain.config.vocab_size, (1, _PROMPT_TOKENS))

    def decoding(which: PreTrainedModel, **options: bool) -> Callable[[int], None]:
        def call(copy: int) -> None:
            made = which.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=model.new_tokens,
                pad_token_id=0,
                **options,
            )
            if made.shape[1] != _PROMPT_TOKENS + model.new_tokens:
                raise RuntimeError(f"benchmark: {model.name} made {tuple(made.shape)} tokens")

        return call

    contenders = [
        Contender("backbone", decoding(plain)),
        Contender(
            "dualhead",
            decoding(gated, fused=True),
            lambda copy: _decode_with(gated.lm_head, ops.decode_step),
        ),
        Contender(
            "logits",
            decoding(gated, fused=False),
            lambda copy: _decode_with(gated.lm_head, ops.decode_step),
        ),
        Contender(
            "eager",
            decoding(gated, fused=False),
            lambda copy: _decode_with(gated.lm_head, reference.decode_step),
        ),
    ]
    timings = alternate(contenders, seconds=seconds, min_rounds=min_rounds, warmup=1)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[plain.dtype]
    return ModelResult(model, name, timings)
