# SPDX-License-Identifier: Apache-2.0
"""Arguments for decode_step, the exact result in float64, and comparisons.

The tests of the operator use them on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dualhead_ext import ops, reference
from dualhead_ext.quantization import format_of, quantize

STATE = ("cache_k", "cache_u", "cache_valid", "cache_length", "draws")  # what a step writes
CPU_ISAS = ops.cpu_isa_levels()
# From this batch size on, fp32 heads take GEMMs at the portable level, whose bits depend on the
# batch: DUALHEAD_GEMM_BATCH of csrc/kernels/cpu/isa_portable.cpp. test_ops_gemm.py has these cases.
GEMM_BATCH = 32


def takes_gemms(isa: str, dtype: torch.dtype, B: int) -> bool:
    """Whether the CPU's step on heads that are not quantised takes GEMMs."""
    return isa == "portable" and dtype == torch.float32 and B >= GEMM_BATCH


def make_case(
    seed: int,
    B: int = 3,
    d: int = 77,
    V: int = 131,
    K: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    H: int = 3,
    d_k: int = 5,
    S: int = 9,
    gate: str = "attention",
    bias: bool = False,
    objective_weights: bool = False,
    reward_head: str = "full",
    r: int = 3,
    controls: bool = False,
    sample: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments.

    gate: "attention", with caches filled to random lengths below S, or "logit".
    reward_head: a correction has rank r and always a bias.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    f32 = torch.float32
    case = {
        "hidden": normal(B, d),
        "lm_weight": normal(V, d, scale=3 * d**-0.5),
    }
    if reward_head == "full":
        case["reward_weight"] = normal(K, V, d, scale=3 * d**-0.5)
    else:
        n = d if reward_head == "embedding" else V
        case |= {"reward_head": reward_head, "reward_bias": normal(K, n)}
        if r:
            case["reward_down"] = normal(K, r, d, scale=d**-0.5)
            case["reward_up"] = normal(K, n, r, scale=r**-0.5)
    if bias:
        case["lm_bias"] = normal(V)
        if reward_head == "full":
            case["reward_bias"] = normal(K, V)
    if objective_weights:
        case["objective_weights"] = normal(B, K, dtype=f32)
    if gate == "attention":
        case |= {
            "q_weight": normal(H * d_k, d, scale=2 * d**-0.5),
            "k_weight": normal(H * d_k, d, scale=2 * d**-0.5),
            "u_weight": normal(H, d, scale=d**-0.5, dtype=f32),
            "gate_bias": normal(1, dtype=f32),
            "cache_k": normal(B, H, S, d_k),
            "cache_u": normal(B, H, S, dtype=f32),
            "cache_valid": uniform(B, S) > 0.2,
            "cache_length": (uniform(B) * S).int(),
        }
    else:
        case["gate_logit"] = normal(B, dtype=f32)
    if controls:
        case |= {"gate_offset": normal(B, dtype=f32), "strength": uniform(B) * 3}
    if sample:
        case |= {
            "seeds": torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator),
            "draws": torch.randint(0, 2**40, (B,), generator=generator),
        }
    return case | options


def quantized(case: dict[str, Any], name: str) -> dict[str, Any]:
    """The case with its (V, d) heads in a quantised format."""
    case = dict(case)
    for head in ("lm", "reward") if "reward_weight" in case else ("lm",):
        q, scale = quantize(case[f"{head}_weight"], name)
        case |= {f"{head}_weight": q, f"{head}_scale": scale}
    return case


def in_double(case: dict[str, Any]) -> dict[str, Any]:
    """The case in float64. Quantised weights stay as they are; the sums take the dtype of the
    scales.
    """

    def widened(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating and format_of(value) is None else value

    return {name: widened(value) for name, value in case.items()}


def run(step, case: dict[str, Any]) -> tuple[reference.DecodeOutput, dict[str, Tensor]]:
    """Call ``step`` with copies of what it writes. Returns its output and the copies afterwards."""
    case = {k: v.clone() if k in STATE else v for k, v in case.items()}
    with torch.no_grad():
        out = step(**case)
    return out, {name: case[name] for name in STATE if case.get(name) is not None}


def rows(case: dict[str, Any], keep: list[int]) -> dict[str, Any]:
    """The case with only some of its requests."""
    shared = ("lm_weight", "lm_bias", "reward_weight", "reward_bias", "lm_scale", "reward_scale")
    shared += ("reward_down", "reward_up", "q_weight", "k_weight", "u_weight", "gate_bias")
    return {
        name: value[keep] if isinstance(value, Tensor) and name not in shared else value
        for name, value in case.items()
    }


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns, so that NaN compares equal to itself."""
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.uint8}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def assert_same_bits(got, expected, what: str = "") -> None:
    """Check that outputs, or dicts of state, are equal to the last bit."""
    pairs = (
        [(k, got[k], expected[k]) for k in expected]
        if isinstance(expected, dict)
        else [(n, getattr(got, n), getattr(expected, n)) for n in expected._fields]
    )
    for name, a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype, (what, name, a.shape, b.shape)
        assert torch.equal(bits(a), bits(b)), f"{what}: {name} differs"


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Use the CPU kernels of one instruction set."""
    torch.ops.dualhead._force_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.dualhead._force_cpu_isa("")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
