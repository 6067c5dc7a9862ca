# SPDX-License-Identifier: Apache-2.0
"""One decode step, fused against what else there is, by size.

Contenders, all from the same hidden states, weights and gate caches:

- ``dualhead``: :func:`dualhead_ext.ops.decode_step`, the compiled operator.
- ``eager``: :func:`dualhead_ext.reference.decode_step`, the same step in plain PyTorch.
- ``compile``: that under ``torch.compile``, max-autotune, static shapes. Heads larger than the
  last-level cache are frozen into the graph as well, so that inductor packs them and picks a GEMM.
  Smaller ones are not: a frozen graph has one copy of its weights, which would stay in the cache
  while all others read theirs from memory.
- ``lm_head``: the backbone's head alone and a token from its logits, in eager PyTorch: what a model
  that nobody directs pays.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..config import DualHeadConfig
from .machine import ReadBandwidth
from .timing import Contender, Ratio, Timing, alternate, copies_needed, ratio

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (d, V): the sizes that documents and issues quote; the last is Llama-2-7B's.
SIZES = ((256, 4096), (512, 8192), (1024, 32000), (4096, 32000))
# Sampled cases: temperature and top-p, of which the latter has to know the whole distribution.
_TEMPERATURE, _TOP_P = 0.8, 0.95
_COMPILE_OPTIONS = {"max_autotune": True}
_GATE = {name: getattr(DualHeadConfig, name) for name in ("gate_num_heads", "gate_head_dim")}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a batch of B, T columns in the gate's cache with the new one.

    ``compile`` says whether the torch.compile contender takes part: compiling takes longer than all
    the timing of a case.
    """

    B: int
    T: int
    sampled: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Group:
    """Cases of one size and format, which share their weights."""

    d: int
    V: int
    format: str
    cases: tuple[Case, ...]

    def __str__(self) -> str:
        return f"{self.d}x{self.V}-{self.format}"


def plan(quick: bool = False) -> list[Group]:
    """The groups to run: all sizes and formats, or, to see in a minute that all works, a few."""
    if quick:
        few = (Case(1, 64, compile=True), Case(4, 64), Case(1, 64, sampled=True))
        return [
            Group(256, 4096, "bf16", few),
            Group(256, 4096, "fp32", (Case(1, 64), Case(4, 64))),
            Group(4096, 32000, "bf16", (Case(1, 256),)),
        ]
    groups = []
    for d, V in SIZES:
        for name in FORMATS:
            largest = (d, V) == SIZES[-1]
            cases = (
                Case(1, 256, compile=True),
                Case(4, 256, compile=largest and name == "fp32"),
                Case(8, 256, compile=largest and name == "bf16"),
                Case(1, 256, sampled=True),
                Case(1, 4096),
            )
            groups.append(Group(d, V, name, cases))
    return groups


def required_speedup(group: Group, case: Case) -> float:
    """What the fused step must reach over eager: 1.5 at Llama-2-7B's size in bf16 for one request,
    1 elsewhere."""
    flagship = (group.d, group.V, group.format) == (*SIZES[-1], "bf16")
    return 1.5 if flagship and case.B == 1 and not case.sampled and case.T == 256 else 1.0


@dataclass(frozen=True)
class CaseResult:
    """Timings of one case, by contender.

    Attributes:
        copies: of weights and caches, used in turn.
        num_bytes: what each contender has to read from memory at least.
        compile_options: what torch.compile was asked for; None where it did not take part.
    """

    group: Group
    case: Case
    timings: dict[str, Timing]
    num_bytes: dict[str, int]
    copies: int
    compile_options: str | None

    def speedup(self, over: str) -> Ratio:
        """How many times as long as the fused step ``over`` takes."""
        return ratio(self.timings[over], self.timings["dualhead"])

    def failure(self) -> str | None:
        """A sentence where the fused step is too slow, None where it is not.

        A required speed-up above 1 is one of medians. "Slower than eager" takes more than a median:
        the 95 % interval of the ratio must lie below 1, lest a draw fail by chance.
        """
        required, got = required_speedup(self.group, self.case), self.speedup("eager")
        too_slow = got.value < required if required > 1 else max(got.value, got.high) < 1
        if not too_slow:
            return None
        return (
            f"{self.group} B={self.case.B} T={self.case.T} "
            f"{'sampled' if self.case.sampled else 'greedy'}: eager takes {got.value:.2f} times as "
            f"long as the fused step (95 % interval {got.low:.2f} to {got.high:.2f}), "
            f"required: {required:g}"
        )

    def rows(self, read: ReadBandwidth) -> list[dict[str, Any]]:
        """One plain dict per contender, as results files have them."""
        return [
            {
                "contender": name,
                "format": self.group.format,
                "d": self.group.d,
                "V": self.group.V,
                "B": self.case.B,
                "T": self.case.T,
                "sampled": self.case.sampled,
                "us_median": timing.us_median,
                "us_q1": timing.us_q1,
                "us_q3": timing.us_q3,
                "repeats": timing.repeats,
                "copies": self.copies,
                "bytes": self.num_bytes[name],
                "read_gb_per_s": read.gb_per_s,
                "share_of_read_bandwidth": read.share(self.num_bytes[name], timing.us_median),
                "compile_options": self.compile_options if name == "compile" else None,
            }
            for name, timing in self.timings.items()
        ]


@dataclass(frozen=True)
class Effort:
    """How long and how cold to measure.

    Attributes:
        seconds, min_rounds: per case, as in :func:`~dualhead_ext.bench.timing.alternate`.
        cold_bytes: what operands used in turn must span (:func:`~.machine.cold_bytes`).
        cache_bytes: the last-level cache; torch.compile freezes weights that are larger.
    """

    seconds: float
    cold_bytes: int
    cache_bytes: int
    min_rounds: int = 15


class Operands:
    """Random weights of a group, in as many copies as it takes to read them cold.

    Attributes:
        group: whose.
        memory: (copies, 2V, d): W_LM above W_RM.
        copies: the weight arguments of ``decode_step``, one dict per copy.
        num_bytes: of one copy.
    """

    def __init__(self, group: Group, cold_bytes: int) -> None:
        self.group = group
        d, V, dtype = group.d, group.V, FORMATS[group.format]
        heads, width = _GATE["gate_num_heads"], _GATE["gate_num_heads"] * _GATE["gate_head_dim"]
        gate_numbers, value_numbers = 2 * width * d, heads * d
        self.num_bytes = (2 * V * d + gate_numbers) * dtype.itemsize + value_numbers * 4
        count = copies_needed(self.num_bytes, cold_bytes)
        self.memory = torch.empty(count, 2 * V, d, dtype=dtype)
        gates = torch.empty(count, 2 * width, d, dtype=dtype)
        values = torch.empty(count, heads, d)
        for tensor in (self.memory, gates, values):
            # One copy is drawn: what makes copies cold is where they lie, not what they hold.
            tensor[0].normal_(std=d**-0.5)
            tensor[1:] = tensor[0]
        self.copies = [
            {
                "lm_weight": self.memory[i, :V],
                "reward_weight": self.memory[i, V:].view(1, V, d),
                "q_weight": gates[i, :width],
                "k_weight": gates[i, width:],
                "u_weight": values[i],
                "gate_bias": torch.zeros(1),
            }
            for i in range(count)
        ]


def requests(group: Group, case: Case, count: int) -> list[dict[str, Tensor]]:
    """The arguments of ``decode_step`` that belong to requests, ``count`` times: hidden states, a
    gate cache with room for the last of T columns, and what sampling needs."""
    B, T, dtype = case.B, case.T, FORMATS[group.format]
    heads, head_dim = _GATE["gate_num_heads"], _GATE["gate_head_dim"]
    hidden = torch.randn(B, group.d).to(dtype)
    made = []
    for _ in range(count):
        arguments = {
            "hidden": hidden.clone(),
            "cache_k": torch.randn(B, heads, T, head_dim).to(dtype),
            "cache_u": torch.randn(B, heads, T),
            "cache_valid": torch.ones(B, T, dtype=torch.bool),
            "cache_length": torch.full((B,), T - 1, dtype=torch.int32),
        }
        if case.sampled:
            arguments |= {
                "seeds": torch.arange(B),
                "draws": torch.zeros(B, dtype=torch.int64),
                "temperature": torch.full((B,), _TEMPERATURE),
                "top_p": torch.full((B,), _TOP_P),
            }
        made.append(arguments)
    return made


def _cache_bytes(group: Group, case: Case) -> int:
    heads, itemsize = _GATE["gate_num_heads"], FORMATS[group.format].itemsize
    return case.B * case.T * (heads * _GATE["gate_head_dim"] * itemsize + heads * 4 + 1)


def lm_head_step(arguments: dict[str, Tensor]) -> Tensor:
    """A token from the backbone's head alone: product, filters and choice, in eager PyTorch."""
    logits = reference.head_logits(arguments["hidden"], arguments["lm_weight"], None)
    if "seeds" not in arguments:
        return logits.argmax(-1)
    names = ("seeds", "draws", "temperature", "top_p")
    return reference.sample_token(logits, **{name: arguments[name] for name in names})


class _Step(nn.Module):
    """The eager step as a module, whose weights are what inductor's freezing takes as constants.

    They are clones: of two weights that are views of one storage, as the operands here are,
    inductor has been seen to pack one for both (torch 2.13, fp32).
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name, weight.clone())

    def forward(self, **arguments: Tensor) -> reference.DecodeOutput:
        return reference.decode_step(**dict(self.named_buffers()), **arguments)


def compiled_step(
    weights: dict[str, Tensor], freeze: bool
) -> Callable[..., reference.DecodeOutput]:
    """The eager step under torch.compile. It takes all arguments of ``decode_step``; frozen, it has
    its own ``weights`` and ignores those it is given.

    Compiles at the first call, which must be inside :func:`_compiling`.
    """
    torch.compiler.reset()  # every case is a variant of one function, beyond 8 dynamo would give up
    step = _Step(weights) if freeze else reference.decode_step
    options = {**_COMPILE_OPTIONS, "freezing": freeze}
    compiled = torch.compile(step, fullgraph=True, dynamic=False, options=options)
    if not freeze:
        return compiled

    def without_weights(**arguments: Tensor) -> reference.DecodeOutput:
        return compiled(**{n: a for n, a in arguments.items() if n not in weights})

    return without_weights


@contextmanager
def _compiling(freeze: bool) -> Iterator[None]:
    """Context of the first call of :func:`compiled_step`. Dynamo reads ``freezing`` from the global
    configuration when it decides whether weights are constants; the option alone is not enough.
    What autotuning says on standard error would tear the tables apart; errors are exceptions."""
    from torch._inductor import config

    with config.patch(freezing=freeze), redirect_stderr(io.StringIO()):
        yield


def check_agreement(
    name: str, got: reference.DecodeOutput, expected: reference.DecodeOutput
) -> None:
    """Raise RuntimeError unless two contenders computed the same: a fast wrong answer is no answer.

    Logits are of order 1 and an eager bf16 product rounds to 3 digits: 0.05 tells that from a wrong
    row, mixture or mask.
    """
    for field in ("alpha", "gate_logit", "logits"):
        error = (getattr(got, field) - getattr(expected, field)).abs().max().item()
        if not error <= 0.05:
            raise RuntimeError(f"benchmark: {name} and eager differ by {error:.3g} in {field}")


def run_case(case: Case, operands: Operands, effort: Effort) -> CaseResult:
    """Time all contenders of one case.

    Raises:
        RuntimeError: there is no compiled kernel to time, or contenders disagree.
    """
    group = operands.group
    if not ops.kernel_for("cpu", FORMATS[group.format]):
        raise RuntimeError(
            f"benchmark: no compiled CPU kernel for {group.format} to time; "
            "`dualhead info` says what was built"
        )
    whole = operands.num_bytes + _cache_bytes(group, case)
    count = min(len(operands.copies), copies_needed(whole, effort.cold_bytes))
    mine = requests(group, case, count)
    arguments = [weights | own for weights, own in zip(operands.copies, mine, strict=False)]
    freeze = operands.num_bytes >= effort.cache_bytes
    with torch.no_grad(), _no_recompiling():
        contenders = _contenders(case, arguments, operands.copies[0], freeze)
        timings = alternate(
            contenders, seconds=effort.seconds, min_rounds=effort.min_rounds, copies=count
        )
    if case.compile:
        torch.compiler.reset()  # frees a frozen graph's weights
    head_alone = group.V * group.d * FORMATS[group.format].itemsize
    num_bytes = dict.fromkeys(timings, whole) | {"lm_head": head_alone}
    options = ("max-autotune, freezing" if freeze else "max-autotune") if case.compile else None
    return CaseResult(group, case, timings, num_bytes, count, options)


def _contenders(
    case: Case, arguments: list[dict[str, Tensor]], weights: dict[str, Tensor], freeze: bool
) -> list[Contender]:
    """All that take part in a case, compiled and seen to agree. ``arguments``: of each copy."""

    def rewind(copy: int) -> None:
        arguments[copy]["cache_length"].fill_(case.T - 1)

    steps = {"dualhead": ops.decode_step, "eager": reference.decode_step}
    if case.compile:
        steps["compile"] = compiled_step(weights, freeze)
        with _compiling(freeze):
            steps["compile"](**arguments[0])
    rewind(0)
    expected = reference.decode_step(**arguments[0])
    for name, step in steps.items():
        rewind(0)
        check_agreement(name, step(**arguments[0]), expected)
    contenders = [
        Contender(name, lambda copy, step=step: step(**arguments[copy]), rewind)
        for name, step in steps.items()
    ]
    return [*contenders, Contender("lm_head", lambda copy: lm_head_step(arguments[copy]))]


def _no_recompiling():
    """Context in which a recompilation, which would be timed, is an error."""
    from torch._dynamo import config

    return config.patch(error_on_recompile=True)
