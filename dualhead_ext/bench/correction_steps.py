# SPDX-License-Identifier: Apache-2.0
"""The decode step with a correction reward head, compared with the plain LM head.

Contenders, over the same hidden states, LM head and gate caches:

- ``embedding``, ``lowrank``: :func:`dualhead_ext.ops.decode_step` with that correction.
- ``full``: the same with a full reward head (its own V x d matrix).
- ``plain``: our own step with the LM head alone: no gate, no reward head.
- ``lm_head``: the LM head and an argmax in eager PyTorch.
- ``embedding int8``, ``lowrank int8``, ``plain int8``: as above with an LM head in int8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..measurement.timing import Contender, alternate, copies_needed
from ..quantization import quantize
from .cases import FORMATS, SIZES, Case, Group
from .comparisons import Comparison, Contest, times
from .contenders import Operands, bytes_of, check_agreement, lm_head_step, requests

RANKS = {"embedding": 16, "lowrank": 64}
# Upper limits of a step's time, as multiples of our own plain step and of the eager LM head; for an
# LM head in int8, as a multiple of the eager LM head in bf16.
OVER_PLAIN, OVER_EAGER, INT8_OVER_EAGER = {"embedding": 1.04, "lowrank": 1.06}, 1.0, 0.6

Arguments = dict[str, Any]


@dataclass(frozen=True)
class StepCase:
    """One setting: sizes, format, batch size B, T columns in the gate's cache, mixture."""

    d: int
    V: int
    format: str
    B: int
    mix: str = "logits"
    T: int = 256

    @property
    def has_goals(self) -> bool:
        """Whether the goals apply: largest size, one request, logits mix."""
        return (self.d, self.V) == SIZES[-1] and self.B == 1 and self.mix == "logits"


def plan(quick: bool = False) -> list[StepCase]:
    """The cases to run."""
    if quick:
        return [StepCase(256, 4096, "bf16", 1)]
    return [
        StepCase(*SIZES[-1], name, batch, mix)
        for name in FORMATS
        for batch in (1, 8)
        for mix in ("logits", "probs")
    ]


def correction(kind: str, d: int, V: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random weights of a correction with K = 1, scaled so that delta is of order 1/3."""
    rank, n = RANKS[kind], d if kind == "embedding" else V
    return {
        "reward_head": kind,
        "reward_down": (torch.randn(1, rank, d) * d**-0.5).to(dtype),
        "reward_up": (torch.randn(1, n, rank) * 0.3 * rank**-0.5).to(dtype),
        "reward_bias": torch.zeros(1, n, dtype=dtype),
    }


class Steps:
    """The arguments of every contender's step, in enough copies to be cold when used in turn."""

    def __init__(self, case: StepCase, cold_bytes: int) -> None:
        group = Group(case.d, case.V, case.format, ())
        operands = Operands(group, cold_bytes)
        count = len(operands.copies)
        asked = requests(group, Case(case.B, case.T), count)
        self.case, self.count = case, count
        self.rows = [weights | own for weights, own in zip(operands.copies, asked, strict=True)]
        self.arguments: dict[str, list[Arguments]] = {"full": self.rows}
        dtype = FORMATS[case.format]
        maps = {kind: correction(kind, case.d, case.V, dtype) for kind in RANKS}
        for kind, made in maps.items():
            self.arguments[kind] = [_corrected(row, made) for row in self.rows]
        self.arguments["plain"] = [_plain(row) for row in self.rows]
        if case.format == "bf16":
            self._add_int8(maps, cold_bytes)
        for several in self.arguments.values():
            for arguments in several:
                arguments["mix_probs"] = case.mix == "probs"

    def _add_int8(self, maps: dict[str, Arguments], cold_bytes: int) -> None:
        q, scale = quantize(self.rows[0]["lm_weight"], "int8")
        numbers = {"lm_weight": q, "lm_scale": scale}
        copies = [
            {name: x.clone() for name, x in numbers.items()}
            for _ in range(max(self.count, copies_needed(bytes_of(numbers), cold_bytes)))
        ]
        rows = [self.rows[i % self.count] | numbers for i, numbers in enumerate(copies)]
        for kind, made in maps.items():
            self.arguments[f"{kind} int8"] = [_corrected(row, made) for row in rows]
        self.arguments["plain int8"] = [_plain(row) for row in rows]

    def rewind(self, copy: int) -> None:
        """Reset every cache to its length before a step."""
        for row in self.rows:
            row["cache_length"].fill_(self.case.T - 1)

    def contenders(self) -> list[Contender]:
        """All contenders, checked against the reference."""
        found = []
        for name, several in self.arguments.items():
            self.rewind(0)
            expected = reference.decode_step(**several[0])
            self.rewind(0)
            check_agreement(name, ops.decode_step(**several[0]), expected)
            found.append(Contender(name, _in_turn(several), self.rewind))
        rows = self.rows
        found.append(Contender("lm_head", lambda copy: lm_head_step(rows[copy]), self.rewind))
        return found


def _corrected(row: Arguments, maps: Arguments) -> Arguments:
    return {n: x for n, x in row.items() if n != "reward_weight"} | maps


def _plain(row: Arguments) -> Arguments:
    """Strength 0 and a given gate logit, so that only the LM head is read."""
    zeros = row["hidden"].new_zeros(len(row["hidden"]), dtype=torch.float32)
    weight, scale = row["lm_weight"], row.get("lm_scale")
    given = {"reward_weight": weight[None], "gate_logit": zeros, "strength": zeros}
    if scale is not None:
        given |= {"lm_scale": scale, "reward_scale": scale[None]}
    return {"hidden": row["hidden"], "lm_weight": weight} | given


def _in_turn(several: list[Arguments]) -> Callable[[int], Tensor]:
    """A call that runs the step on the next of ``several``; int8 heads have more copies."""
    turn = -1

    def call(copy: int) -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(several)
        return ops.decode_step(**several[turn]).token

    return call


def run_case(case: StepCase, *, seconds: float, cold_bytes: int, min_rounds: int = 15) -> Contest:
    """Time all contenders of one case.

    Raises:
        RuntimeError: there is no compiled kernel to time, or a contender disagrees with the
            reference.
    """
    if not ops.kernel_for("cpu", FORMATS[case.format]):
        raise RuntimeError(f"benchmark: no compiled CPU kernel for {case.format} to time")
    steps = Steps(case, cold_bytes)
    with torch.no_grad():
        timings = alternate(
            steps.contenders(), seconds=seconds, min_rounds=min_rounds, copies=steps.count
        )
    comparisons = {}
    for name in [name for name in timings if name != "lm_head"]:
        kind, int8 = name.split()[0], name.endswith("int8")
        goals = (OVER_PLAIN.get(kind), INT8_OVER_EAGER if int8 else OVER_EAGER)
        if not case.has_goals or kind not in RANKS:
            goals = (None, None)
        plain = "plain int8" if int8 else "plain"
        comparisons[name] = [
            Comparison.of_times(timings[name], timings[over], goal)
            for over, goal in ((plain, None if int8 else goals[0]), ("lm_head", goals[1]))
            if over != name
        ]
    setting = {
        "d": case.d, "V": case.V, "format": case.format, "B": case.B, "T": case.T, "mix": case.mix,
    }  # fmt: skip
    ranks = {kind: {"rank": rank} for kind, rank in RANKS.items()}
    figures = {n: ranks.get(n.split()[0], {}) | row for n, row in times(timings).items()}
    return Contest("step", setting, figures, comparisons)
