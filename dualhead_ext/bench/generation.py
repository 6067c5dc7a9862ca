# SPDX-License-Identifier: Apache-2.0
"""Throughput of whole models: the cost that a gated head adds to decoding with the backbone.

Contenders, each by greedy ``generate()`` of one request, sharing the backbone's weights:

- ``backbone``: the plain model.
- ``dualhead``: the model with a gated head, in the fused loop
  (:mod:`dualhead_ext.model.fused_loop`).
- ``logits``: the gated model in transformers' own loop, which takes the argmax of the logits.
- ``eager``: as ``logits``, with the head's step in plain PyTorch.
- ``backbone_static``, ``dualhead_static``: as ``backbone`` and ``dualhead`` with a static cache,
  for which transformers compiles the forward pass. With its default cache a GPU waits for Python.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo

from .. import ops
from ..measurement.timing import Contender, Ratio, Timing, alternate, clock_of, ratio
from . import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "backbone"
_PROMPT_TOKENS = 16

CONTENDERS = ("backbone", "dualhead", "logits", "eager")
GPU_CONTENDERS = ("backbone", "dualhead", "logits", "backbone_static", "dualhead_static")
# Upper limit of a gated 7B model's time per token, as a multiple of the plain model's.
ALLOWED_7B = 1.022


@dataclass(frozen=True)
class Model:
    """A backbone to decode with.

    Attributes:
        name: name in tables.
        build: makes the backbone on a device of the given type, with random or embedded weights.
        new_tokens: number of tokens to generate per call.
        contenders: names of those that take part; a gated one needs its plain counterpart.
        allowed: upper limit of the fused loop's time, as a multiple of its plain counterpart's;
            None if there is none.
    """

    name: str
    build: Callable[[str], PreTrainedModel]
    new_tokens: int
    contenders: tuple[str, ...] = CONTENDERS
    allowed: float | None = None


def tiny_model(contenders: tuple[str, ...] = CONTENDERS) -> Model:
    """A random Llama of 2 layers, for tests of the harness."""
    return Model("random Llama, 0.2M", models.TINY.build, 4, contenders)


def medium_model() -> Model:
    """A random Llama of 92 million parameters."""
    return Model("random Llama, 92M", models.MEDIUM.build, 24)


def embedded_model() -> Model:
    """The backbone embedded in the package."""

    def build(device_type: str) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(_EMBEDDED)
        return model.to(device_type)

    return Model("embedded backbone", build, 48)


def plan(quick: bool = False) -> list[Model]:
    """The models to run; the quick plan leaves out the medium one."""
    return [embedded_model()] if quick else [embedded_model(), medium_model()]


def gpu_plan(quick: bool = False) -> list[Model]:
    """The models to run on a GPU: random Llamas of the size of 7B models, or, quick, of 1B ones."""
    if quick:
        return [Model("random Llama, 1.1B", models.LLAMA_1B.build, 16, GPU_CONTENDERS)]
    # Two cases, so that the first is kept whatever the compiler does to the second.
    return [
        Model("random Llama, 6.7B", models.LLAMA_7B.build, 64, contenders, ALLOWED_7B)
        for contenders in (GPU_CONTENDERS[:3], GPU_CONTENDERS[3:])
    ]


def plain_counterpart(contender: str) -> str:
    """The plain model in the same loop with the same cache."""
    return "backbone_static" if contender.endswith("_static") else "backbone"


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

    def against_plain(self, contender: str) -> Ratio:
        """How many times as long a contender takes as its plain counterpart."""
        return ratio(self.timings[contender], self.timings[plain_counterpart(contender)])

    def failures(self) -> list[str]:
        """A sentence for each fused loop that exceeds its limit by more than the spread."""
        found = []
        for name in [n for n in self.timings if n.startswith("dualhead") and self.model.allowed]:
            against = self.against_plain(name)
            if min(against.value, against.low) > self.model.allowed:
                found.append(
                    f"{self.model.name}: {name} takes {against.value:.3f} times as long as "
                    f"{plain_counterpart(name)} (95 % interval {against.low:.3f} to "
                    f"{against.high:.3f}), allowed: {self.model.allowed:g}"
                )
        return found

    def text(self) -> str:
        """The rows for a terminal."""
        lines = [f"\n{self.model.name}, {self.format}, greedy, B=1, {self.model.new_tokens} tokens"]
        for row in self.rows():
            name = row["contender"]
            against = self.against_plain(name)
            lines.append(
                f"    {name:<15} {row['tokens_per_s_median']:>8.1f} tokens/s "
                f"({row['tokens_per_s_q1']:.1f}..{row['tokens_per_s_q3']:.1f}), "
                f"{against.value:.3f} times {plain_counterpart(name)}'s time "
                f"({against.low:.3f}..{against.high:.3f}), n = {row['repeats']}"
            )
        return "\n".join(lines + [f"    TOO SLOW: {failure}" for failure in self.failures()])


def _static_options(device_type: str) -> dict[str, Any]:
    """Options of ``generate()`` for a static cache, with which transformers compiles the forward
    pass. It does so by default on a GPU only; on the CPU it is told to, with a backend that traces
    the graph without compiling it."""
    from transformers import CompileConfig

    compiled = CompileConfig()
    if device_type == "cpu":
        compiled = CompileConfig(backend="aot_eager", mode=None)
        vars(compiled)["_compile_all_devices"] = True  # transformers annotates it as None
    return {"cache_implementation": "static", "compile_config": compiled}


def _contenders(model: Model, plain: Any, gated: Any) -> list[Contender]:
    device = plain.device
    prompt = torch.randint(0, plain.config.vocab_size, (1, _PROMPT_TOKENS)).to(device)
    static = _static_options(device.type)
    ways = {
        "backbone": (plain, {}, None),
        "dualhead": (gated, {"fused": True}, "kernel"),
        "logits": (gated, {"fused": False}, "kernel"),
        "eager": (gated, {"fused": False}, "reference"),
        "backbone_static": (plain, static, None),
        "dualhead_static": (gated, static | {"fused": True}, "kernel"),
    }

    def contender(name: str) -> Contender:
        which, options, step = ways[name]

        def prepare(copy: int) -> None:
            gc.collect()  # disabled by the timer: free the last call's cache here
            if step is not None:
                gated.lm_head.impl = step

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
            if "compile_config" in options and not hasattr(which, "_compiled_call"):
                raise RuntimeError(f"benchmark: transformers did not compile {name}'s forward pass")

        return Contender(name, call, prepare)

    return [contender(name) for name in model.contenders]


def run_model(
    model: Model, *, seconds: float, min_rounds: int = 5, device_type: str = "cpu"
) -> ModelResult:
    """Time ``generate()`` of one model with and without the gated head.

    Args:
        seconds, min_rounds: as in :func:`~dualhead_ext.measurement.timing.alternate`.
    Raises:
        RuntimeError: there is no compiled kernel to time, a contender stopped early, or one that
            should have been compiled was not.
    """
    from ..model.causal_lm import DualHeadForCausalLM

    plain = model.build(device_type).eval()
    plain.generation_config.eos_token_id = None  # min_new_tokens would need logits
    gated = DualHeadForCausalLM.from_backbone(
        models.twin(plain), reward_head="full", gate="attention"
    ).eval()
    if not ops.kernel_for(device_type, plain.dtype):
        raise RuntimeError(
            f"benchmark: no compiled {device_type.upper()} kernel for {plain.dtype} to time"
        )
    # The first round compiles; the second may record CUDA graphs again for its own caches.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        timings = alternate(
            _contenders(model, plain, gated),
            seconds=seconds,
            min_rounds=min_rounds,
            warmup=2 if device_type == "cuda" else 1,
            clock=clock_of(device_type),
        )
    torch.compiler.reset()  # frees the graphs and the tensors that they hold
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[plain.dtype]
    return ModelResult(model, name, timings)
