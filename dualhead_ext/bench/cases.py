# SPDX-License-Identifier: Apache-2.0
"""The cases of the decode benchmark: sizes, formats, batches, and each case's required speed-up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (d, V): the sizes that the documentation quotes; the last is Llama-2-7B's.
SIZES = ((256, 4096), (512, 8192), (1024, 32000), (4096, 32000))


@dataclass(frozen=True)
class Case:
    """One setting of the benchmark.

    Attributes:
        B: batch size.
        T: columns in the gate's cache, including the new one.
        sampled: whether tokens are sampled instead of greedy.
        compile: whether the torch.compile contender takes part; compiling takes longer than all
            the timing of a case.
        graphs: whether the contenders of :mod:`.graphs` take part, as they do on GPUs.
        quantized: whether the fused step also takes part with heads in each format of
            :mod:`dualhead_ext.quantization`.
    """

    B: int
    T: int
    sampled: bool = False
    compile: bool = False
    graphs: bool = False
    quantized: bool = False


@dataclass(frozen=True)
class Group:
    """Cases of one size and format that share their weights."""

    d: int
    V: int
    format: str
    cases: tuple[Case, ...]

    def __str__(self) -> str:
        return f"{self.d}x{self.V}-{self.format}"


def plan(quick: bool = False) -> list[Group]:
    """The groups to run: all sizes and formats, or with ``quick`` a few, in under a minute."""
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
            formats = largest and name == "bf16"
            cases = (
                Case(1, 256, compile=True, quantized=formats),
                Case(4, 256, compile=largest and name == "fp32"),
                Case(8, 256, compile=formats, quantized=formats),
                Case(1, 256, sampled=True),
                Case(1, 4096),
                *(Case(B, 256) for B in ((16, 32, 64) if largest else (64,))),
            )
            groups.append(Group(d, V, name, cases))
    return groups


def growth_plan() -> list[Group]:
    """Groups that show how a step's cost grows: with V, and at the largest size with T and B."""
    d, V = SIZES[-1]
    smaller = [Group(d, V // n, "bf16", (Case(1, 256),)) for n in (16, 8, 4, 2)]
    lengths = tuple(Case(1, T) for T in (64, 1024, 2048, 4096))
    batches = tuple(Case(B, 256) for B in (1, 2, 4, 8, 16, 32, 64))
    return [*smaller, Group(d, V, "bf16", lengths + batches)]


def gpu_plan(quick: bool = False) -> list[Group]:
    """The groups to run on a GPU: heads of 7B, 8B and 70B models, at batch size 1 and larger."""
    one = Case(1, 256, graphs=True, quantized=True)
    if quick:
        return [Group(4096, 32000, "bf16", (Case(1, 256, graphs=True),))]
    batches = tuple(Case(B, 256, graphs=True) for B in (4, 8, 16, 64))
    formats = tuple(Case(B, 256, graphs=True, quantized=True) for B in (8, 64))
    long, sampled = Case(1, 4096, graphs=True), Case(1, 256, sampled=True, graphs=True)
    between = tuple(Case(B, 256, graphs=True) for B in (4, 16))
    many = Case(128, 256, graphs=True)  # by GEMMs
    compiled = (Case(1, 256, compile=True, graphs=True),)
    return [
        Group(4096, 32000, "bf16", (one, sampled, *formats, *between, long, many)),
        Group(4096, 128256, "bf16", (one, sampled, *batches)),
        Group(8192, 128256, "bf16", (Case(1, 256, graphs=True), *batches)),
        Group(4096, 32000, "fp32", (Case(1, 256, graphs=True),)),
        # Last, because compiling takes longer than everything else.
        Group(4096, 32000, "bf16", compiled),
        Group(4096, 128256, "bf16", compiled),
    ]


# A step that reads at this share of the bandwidth measured in the same rounds is limited by memory:
# no larger speed-up is required of it.
SHARE_AT_THE_LIMIT = 0.9


def required_speedup(group: Group, case: Case) -> float:
    """The speed-up over eager that the fused step must reach: 1.5 on the CPU at Llama-2-7B's size
    in bf16 for one greedy request with T = 256, 1 elsewhere."""
    if case.graphs:
        return 1.0
    flagship = (group.d, group.V, group.format) == (*SIZES[-1], "bf16")
    return 1.5 if flagship and case.B == 1 and not case.sampled and case.T == 256 else 1.0
