# SPDX-License-Identifier: Apache-2.0
"""The training loss, forward and backward, with the LM head and the backbone frozen: time, memory.

Contenders, over the same hidden states of pairs whose every token is a response token:

- ``dualhead``: :mod:`dualhead_ext.fused_loss`.
- ``eager``: :mod:`dualhead_ext.reference_loss`, the same objective in plain PyTorch.
- ``compile``: that under ``torch.compile``.
- ``torch_chunked``: ``torch.nn.functional.linear_cross_entropy``, chunked, over
  ``[(1 - a) h; a h]`` and ``[W_LM; W_RM]``. It computes the language model term alone (no
  preference term, and a gradient of W_LM that nobody asked for); left out where PyTorch has none.
- ``liger``: Liger-Kernel's fused linear cross-entropy over the same, on CUDA, where installed.

bf16 means what training means by it: hidden states and LM head in bf16, the reward head in fp32
under autocast.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import fused_loss, reference_loss
from ..losses import LossOptions
from .cases import FORMATS
from .timing import Contender, Timing, alternate, clock_of, ratio

# What the fused loss must reach at the largest size: its share of eager's time and of the memory
# that eager takes beyond the gradients; elsewhere it must not be slower than eager.
REQUIRED_TIME, REQUIRED_MEMORY = 0.8, 0.15
_LARGEST = (1024, 32000)


try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
except ImportError:
    liger = None


@dataclass(frozen=True)
class LossCase:
    """A batch of pairs: ``tokens`` of all responses together, half of them chosen. ``compile`` says
    whether the torch.compile contender takes part.
    """

    d: int
    V: int
    format: str
    tokens: int = 2048
    pairs: int = 8
    compile: bool = True

    def __str__(self) -> str:
        return f"{self.d}x{self.V}-{self.format}"


def plan(quick: bool = False) -> list[LossCase]:
    """The cases to run; the quick plan's is small."""
    if quick:
        return [LossCase(256, 4096, "fp32", tokens=512)]
    return [LossCase(d, V, name) for d, V in ((256, 4096), _LARGEST) for name in FORMATS]


def gpu_plan(quick: bool = False) -> list[LossCase]:
    """The cases to run on a GPU: 8192 response tokens at the sizes of 7B and 8B models."""
    if quick:
        return [LossCase(256, 4096, "bf16", tokens=512, compile=False)]
    return [LossCase(4096, V, "bf16", tokens=8192, pairs=32) for V in (32000, 128256)]


def _is_largest(case: LossCase) -> bool:
    return (case.d, case.V) == _LARGEST


def _required_ratio(case: LossCase) -> float:
    """Of eager's time to the fused loss's."""
    return 1 / REQUIRED_TIME if _is_largest(case) else 1.0


@dataclass(frozen=True)
class LossResult:
    """Timings of forward and backward together, and peak bytes beyond the gradients."""

    case: LossCase
    timings: dict[str, Timing]
    extra_bytes: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files have them."""
        return [
            {
                "contender": name,
                "format": self.case.format,
                "d": self.case.d,
                "V": self.case.V,
                "tokens": self.case.tokens,
                "us_median": timing.us_median,
                "us_q1": timing.us_q1,
                "us_q3": timing.us_q3,
                "repeats": timing.repeats,
                "extra_bytes": self.extra_bytes[name],
            }
            for name, timing in self.timings.items()
        ]

    def failures(self) -> list[str]:
        """Sentences on what was missed."""
        against = ratio(self.timings["eager"], self.timings["dualhead"])
        memory = self.extra_bytes["dualhead"] / self.extra_bytes["eager"]
        found = []
        if max(against.value, against.high) < _required_ratio(self.case):
            found.append(
                f"loss {self.case}: eager takes {against.value:.2f} times as long (95 % interval "
                f"{against.low:.2f} to {against.high:.2f})"
            )
        if _is_largest(self.case) and memory > REQUIRED_MEMORY:
            found.append(f"loss {self.case}: {memory:.0%} of the memory that eager takes")
        return found

    def text(self) -> str:
        """The rows for a terminal."""
        lines = [f"\nloss, {self.case}, {self.case.tokens} tokens, forward and backward"]
        for row, timing in zip(self.rows(), self.timings.values(), strict=True):
            against = ratio(timing, self.timings["dualhead"])
            lines.append(
                f"    {row['contender']:<13} {row['us_median'] / 1e3:>9.1f} ms "
                f"({row['us_q1'] / 1e3:.1f}..{row['us_q3'] / 1e3:.1f}), {against.value:.2f} times "
                f"dualhead's time ({against.low:.2f}..{against.high:.2f}), "
                f"{row['extra_bytes'] / 1e6:.0f} MB beyond the gradients, n = {row['repeats']}"
            )
        return "\n".join(lines + [f"    MISSED: {failure}" for failure in self.failures()])


class _Batch:
    """Random operands of a case, and one forward and backward pass over them per contender."""

    def __init__(self, case: LossCase, device_type: str = "cpu") -> None:
        generator = torch.Generator(device_type).manual_seed(0)
        on = {"generator": generator, "device": device_type}
        rows, length = 2 * case.pairs, case.tokens // (2 * case.pairs)
        dtype = FORMATS[case.format]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, **on)

        self.device_type = device_type

        self.autocast = dtype == torch.bfloat16
        self.pairs = case.pairs
        self.hidden = normal(rows, length, case.d).to(dtype)
        self.labels = torch.randint(case.V, (rows, length), **on)
        self.mask = torch.ones(rows, length, dtype=torch.bool, device=device_type)
        self.gate_logit = normal(rows, length).requires_grad_()
        self.lm_weight = (normal(case.V, case.d) / case.d**0.5).to(dtype)
        noise = normal(case.V, case.d) / case.d**0.5
        self.reward_weight = (self.lm_weight.float() + 0.1 * noise)[None].requires_grad_()

    def objective(self, function: Callable[..., Any]) -> torch.Tensor:
        """The loss of both terms by one of the modules' ``dual_head_loss``."""
        heads = reference_loss.Heads(self.lm_weight, None, self.reward_weight, None, None)
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            return function(
                self.hidden, self.labels, self.mask, self.gate_logit, heads, LossOptions(),
                self.pairs,
            ).loss  # fmt: skip

    def language_model_term(self, cross_entropy: Callable[..., torch.Tensor]) -> torch.Tensor:
        """By a fused linear cross-entropy (hidden, weight, labels) -> sum."""
        share = torch.sigmoid(self.gate_logit[: self.pairs])[..., None].to(self.hidden.dtype)
        hidden = self.hidden[: self.pairs]
        both = torch.cat(((1 - share) * hidden, share * hidden), -1).flatten(0, 1)
        reward = self.reward_weight[0].to(self.lm_weight.dtype)
        weight = torch.cat((self.lm_weight, reward), 1)
        labels = self.labels[: self.pairs].flatten()
        return cross_entropy(both, weight, labels) / self.pairs

    def forget(self, copy: int = 0) -> None:
        """Gradients are made anew in each call."""
        self.gate_logit.grad = self.reward_weight.grad = None


def _calls(batch: _Batch, compile: bool) -> dict[str, Callable[[], torch.Tensor]]:
    calls = {
        "dualhead": lambda: batch.objective(fused_loss.dual_head_loss),
        "eager": lambda: batch.objective(reference_loss.dual_head_loss),
    }
    if compile:
        compiled = torch.compile(reference_loss.dual_head_loss)
        calls["compile"] = lambda: batch.objective(compiled)
    if hasattr(F, "linear_cross_entropy"):
        calls["torch_chunked"] = lambda: batch.language_model_term(_torch_chunked)
    if liger is not None and batch.device_type == "cuda":
        calls["liger"] = lambda: batch.language_model_term(_liger)
    return calls


def _torch_chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return liger(hidden, weight, labels, reduction="sum")


def run_case(
    case: LossCase, *, seconds: float, min_rounds: int = 5, device_type: str = "cpu"
) -> LossResult:
    """Time all contenders of one case and measure their memory.

    Args:
        seconds, min_rounds: as in :func:`~dualhead_ext.bench.timing.alternate`.
    Raises:
        RuntimeError: contenders disagree.
    """
    batch = _Batch(case, device_type)
    calls = _calls(batch, case.compile)

    def passes(call: Callable[[], torch.Tensor]) -> Callable[[int], None]:
        return lambda copy: call().backward()

    contenders = [Contender(name, passes(call), batch.forget) for name, call in calls.items()]
    _check_agreement(batch, calls)
    gradients = sum(x.numel() * 4 for x in (batch.gate_logit, batch.reward_weight))
    peak = peak_cuda_bytes if device_type == "cuda" else peak_bytes
    extra = {c.name: peak(c) - gradients for c in contenders}
    timings = alternate(
        contenders,
        seconds=seconds,
        min_rounds=min_rounds,
        warmup=1,
        clock=clock_of(device_type),
    )
    batch.forget()
    return LossResult(case, timings, extra)


def _check_agreement(batch: _Batch, calls: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Raise unless the whole objectives and their gradients agree: eager's bf16 logits of order 1
    round to 3 digits, and the gate's gradient is a difference of them.
    """
    tolerance, found = 5e-2 if batch.autocast else 1e-3, {}
    for name in [name for name in ("eager", "dualhead", "compile") if name in calls]:
        batch.forget()
        loss = calls[name]()
        loss.backward()
        found[name] = (loss.detach(), batch.gate_logit.grad, batch.reward_weight.grad)
        for got, expected in zip(found[name], found["eager"], strict=True):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error <= tolerance:
                raise RuntimeError(f"benchmark: {name} and eager's loss differ by {error:.2g}")
    batch.forget()


def peak_bytes(contender: Contender) -> int:
    """The most bytes of PyTorch's CPU allocator in use during a call, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    contender.prepare(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        contender.call(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    in_use = peak = 0
    for event in memory:
        in_use += event["args"]["Bytes"]
        peak = max(peak, in_use)
    return peak


def peak_cuda_bytes(contender: Contender) -> int:
    """The same of the CUDA allocator of the current device."""
    contender.prepare(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
