# SPDX-License-Identifier: Apache-2.0
"""The contenders of the decode benchmark and their operands.

All use the same hidden states, weights and gate caches:

- ``dualhead``: :func:`dualhead_ext.ops.decode_step`, the compiled operator.
- ``eager``: :func:`dualhead_ext.reference.decode_step`, the same step in plain PyTorch.
- ``compile``: the eager step under ``torch.compile``, max-autotune, static shapes. Heads larger
  than the last-level cache are also frozen into the graph, so that inductor packs them and picks a
  GEMM. Smaller heads are not: a frozen graph has one copy of its weights, which would stay in the
  cache while all other contenders read theirs from memory.
- ``lm_head``: the backbone's LM head alone and a token from its logits, in eager PyTorch: the cost
  of a model without a gated head.
- ``int8``, ``fp8``, ``int4``: as ``dualhead``, with the same heads quantised.

GPU cases add the contenders of :mod:`.graphs`, and all but ``eager`` run from CUDA graphs.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..config import DualHeadConfig
from ..measurement.timing import Contender, copies_needed
from ..ops.huge_pages import use_huge_pages
from ..quantization import quantize
from .cases import FORMATS, Case, Group
from .graphs import capture, gemm_step, gumbel_token

# Sampled cases: temperature and top-p; top-p needs the whole distribution.
_TEMPERATURE, _TOP_P = 0.8, 0.95
_COMPILE_OPTIONS: dict[str, Any] = {"max_autotune": True}
_GATE = {name: getattr(DualHeadConfig, name) for name in ("gate_num_heads", "gate_head_dim")}


class Operands:
    """A group's random weights, in as many copies as are needed to read them from memory.

    Attributes:
        group: the group that the weights belong to.
        device: the device that holds them.
        memory: (copies, 2V, d): W_LM above W_RM.
        copies: the weight arguments of ``decode_step``, one dict per copy.
        num_bytes: size of one copy.
    """

    def __init__(self, group: Group, cold_bytes: int, device_type: str = "cpu") -> None:
        self.group = group
        self.device = torch.device(device_type)
        d, V, dtype = group.d, group.V, FORMATS[group.format]
        heads, width = _GATE["gate_num_heads"], _GATE["gate_num_heads"] * _GATE["gate_head_dim"]
        gate_numbers, value_numbers = 2 * width * d, heads * d
        self.num_bytes = (2 * V * d + gate_numbers) * dtype.itemsize + value_numbers * 4
        count = copies_needed(self.num_bytes, cold_bytes)
        device = self.device
        self.memory = torch.empty(count, 2 * V, d, dtype=dtype, device=device)
        gates = torch.empty(count, 2 * width, d, dtype=dtype, device=device)
        values = torch.empty(count, heads, d, device=device)
        for tensor in (self.memory, gates, values):
            # Draw one copy only: copies are cold because of their addresses, not their values.
            tensor[0].normal_(std=d**-0.5)
            tensor[1:] = tensor[0]
        use_huge_pages([self.memory, gates, values])  # as a model's weights; for all contenders
        self.copies = [
            {
                "lm_weight": self.memory[i, :V],
                "reward_weight": self.memory[i, V:].view(1, V, d),
                "q_weight": gates[i, :width],
                "k_weight": gates[i, width:],
                "u_weight": values[i],
                "gate_bias": torch.zeros(1, device=device),
            }
            for i in range(count)
        ]

    def quantized(self, name: str, cold_bytes: int) -> list[dict[str, Tensor]]:
        """The weight arguments with heads in the format ``name``, in enough copies to be cold."""
        weights = dict(self.copies[0])
        for head in ("lm", "reward"):
            q, scale = quantize(weights[f"{head}_weight"], name)
            weights |= {f"{head}_weight": q, f"{head}_scale": scale}
        count = copies_needed(bytes_of(weights), cold_bytes)
        copies = [{n: w.clone() for n, w in weights.items()} for _ in range(count)]
        for weights in copies:
            use_huge_pages(weights.values())
        return copies


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def requests(
    group: Group, case: Case, count: int, device: torch.device | None = None, steps: int = 1
) -> list[dict[str, Tensor]]:
    """``count`` copies of the per-request arguments of ``decode_step``: hidden states, a gate cache
    of T - 1 columns with room for ``steps`` more, and sampling parameters."""
    B, T, dtype = case.B, case.T, FORMATS[group.format]
    columns = T - 1 + steps
    heads, head_dim = _GATE["gate_num_heads"], _GATE["gate_head_dim"]
    hidden = torch.randn(B, group.d).to(dtype)
    made = []
    for _ in range(count):
        arguments = {
            "hidden": hidden.clone(),
            "cache_k": torch.randn(B, heads, columns, head_dim).to(dtype),
            "cache_u": torch.randn(B, heads, columns),
            "cache_valid": torch.ones(B, columns, dtype=torch.bool),
            "cache_length": torch.full((B,), T - 1, dtype=torch.int32),
        }
        if case.sampled:
            arguments |= {
                "seeds": torch.arange(B),
                "draws": torch.zeros(B, dtype=torch.int64),
                "temperature": torch.full((B,), _TEMPERATURE),
            }
            # With graphs all contenders sample by Gumbel noise; top-p would need a sort.
            arguments |= {} if case.graphs else {"top_p": torch.full((B,), _TOP_P)}
        made.append({name: value.to(device) for name, value in arguments.items()})
    return made


def cache_bytes(group: Group, case: Case) -> int:
    heads, itemsize = _GATE["gate_num_heads"], FORMATS[group.format].itemsize
    return case.B * case.T * (heads * _GATE["gate_head_dim"] * itemsize + heads * 4 + 1)


def lm_head_step(arguments: dict[str, Tensor]) -> Tensor:
    """A token from the LM head alone: product, filters and choice, in eager PyTorch."""
    logits = reference.head_logits(arguments["hidden"], arguments["lm_weight"], None)
    if "seeds" not in arguments:
        return logits.argmax(-1)
    if "top_p" not in arguments:
        return gumbel_token(logits, arguments["temperature"])
    names = ("seeds", "draws", "temperature", "top_p")
    return reference.sample_token(logits, **{name: arguments[name] for name in names})


class _Step(nn.Module):
    """The eager step as a module, because inductor's freezing turns module weights into constants.

    The weights are clones: if two weights are views of one storage, as the operands here are,
    inductor may use one packed weight for both (seen with torch 2.13, fp32).
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name, weight.clone())

    def forward(self, **arguments: Any) -> reference.DecodeOutput:
        weights: dict[str, Any] = dict(self.named_buffers())
        return reference.decode_step(**weights, **arguments)


def compiled_step(
    weights: dict[str, Tensor], freeze: bool
) -> Callable[..., reference.DecodeOutput]:
    """The eager step under torch.compile. It takes all arguments of ``decode_step``; if frozen, it
    uses a copy of ``weights`` and ignores the weight arguments.

    Compiles at the first call, which must be inside :func:`_compiling`.
    """
    torch.compiler.reset()  # every case recompiles one function; after 8, dynamo would give up
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
    """Context for the first call of :func:`compiled_step`.

    Dynamo reads ``freezing`` from the global configuration when it decides whether weights are
    constants; the option alone is not enough. Autotuning's messages on standard error, which would
    interrupt the tables, are dropped; errors are exceptions.
    """
    from torch._inductor import config

    with config.patch(freezing=freeze), redirect_stderr(io.StringIO()):
        yield


def check_agreement(
    name: str, got: reference.DecodeOutput, expected: reference.DecodeOutput
) -> None:
    """Raise RuntimeError unless two contenders computed the same result.

    Logits are of order 1 and an eager bf16 product rounds to 3 digits: a tolerance of 0.05 accepts
    that rounding and detects a wrong row, mixture or mask.
    """
    for field in ("alpha", "gate_logit", "logits"):
        error = (getattr(got, field) - getattr(expected, field)).abs().max().item()
        if not error <= 0.05:
            raise RuntimeError(f"benchmark: {name} and eager differ by {error:.3g} in {field}")


def _in_turn(steps: list[Callable[[int], object]]) -> Callable[[int], object]:
    """A call that runs the next of ``steps``, independent of the copy number it is given."""
    turn = itertools.cycle(steps)
    return lambda copy: next(turn)(copy)


def make_contenders(
    case: Case,
    arguments: list[dict[str, Any]],
    weights: dict[str, Tensor],
    freeze: bool,
    stacked: Tensor | None = None,
    quantized: dict[str, list[dict[str, Any]]] | None = None,
) -> list[Contender]:
    """All contenders of a case: compiled, captured, and checked against the eager step.

    Args:
        arguments: the arguments of ``decode_step`` for each copy.
        weights: the weight arguments of the first copy.
        freeze: whether torch.compile freezes the weights.
        stacked: (copies, 2V, d), the weights of both heads.
        quantized: format -> weight arguments for each copy of the quantised weights.
    """

    def rewind(copy: int) -> None:
        arguments[copy]["cache_length"].fill_(case.T - 1)

    def each(step: Callable[..., reference.DecodeOutput]) -> Callable[[int], Any]:
        return lambda copy: step(**arguments[copy])

    calls: dict[str, Callable[[int], Any]] = {
        "dualhead": each(ops.decode_step),
        "eager": each(reference.decode_step),
    }
    if case.compile:
        calls["compile"] = each(compiled_step(weights, freeze))
        with _compiling(freeze):
            calls["compile"](0)
    if case.graphs:
        calls["two_gemms"] = lambda copy: gemm_step(arguments[copy])
        calls["one_gemm"] = lambda copy: gemm_step(arguments[copy], stacked[copy])
    calls["lm_head"] = lambda copy: lm_head_step(arguments[copy])
    device, copies = weights["lm_weight"].device, len(arguments)

    def graph(call: Callable[[int], object]) -> Callable[[int], object]:
        return capture(call, rewind, copies, device) if case.graphs else call

    for name in calls.keys() - {"eager"}:
        calls[name] = graph(calls[name])
    for name, copies_of in (quantized or {}).items():
        # Quantised weights are smaller and need more copies: one step, and one graph, for each.
        steps = [
            lambda copy, own=own: ops.decode_step(**arguments[copy] | own) for own in copies_of
        ]
        calls[name] = _in_turn([graph(step) for step in steps])
    rewind(0)
    expected = reference.decode_step(**arguments[0])
    for name, call in calls.items():
        rewind(0)
        if name in (quantized or {}):
            rewind(0)
            truth = reference.decode_step(**arguments[0] | quantized[name][0])
            rewind(0)
            check_agreement(name, call(0), truth)
        elif name != "lm_head":
            check_agreement(name, call(0), expected)
    return [Contender(name, call, rewind) for name, call in calls.items()]
