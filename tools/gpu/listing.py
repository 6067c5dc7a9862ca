# SPDX-License-Identifier: Apache-2.0
"""Listings of machine code as ``cuobjdump -sass`` prints them: instructions, loops, paths."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);\s*/\* 0x[0-9a-f]{16} \*/"
)
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_FUNCTION = re.compile(r"Function : (\S+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        opcode: the opcode with its modifiers, such as "LDS.128".
        operands: the rest of its text.
        stall: cycles until the warp's next instruction.
        sets: the scoreboard that its result signals, or 7.
        waits: bit mask of the scoreboards that it waits for.
        guarded: whether a predicate decides if it is executed.
    """

    address: int
    opcode: str
    operands: str
    stall: int
    sets: int
    waits: int
    guarded: bool

    @property
    def target(self) -> int | None:
        """The target address of a branch; None for other instructions."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands.strip())
        return int(found[1], 16) if self.opcode.startswith("BRA") and found else None


def parse(text: str) -> dict[str, list[Instruction]]:
    """Parse the kernels in the output of ``cuobjdump -sass``.

    Raises:
        ValueError: an instruction has no control bits.
    """
    kernels: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    lines = iter(text.splitlines())
    for line in lines:
        if named := _FUNCTION.search(line):
            current = kernels.setdefault(named[1], [])
        elif found := _INSTRUCTION.search(line):
            control = _CONTROL.match(next(lines, ""))
            if control is None:
                raise ValueError(f"an instruction without control bits: {line}")
            bits = int(control[1], 16)
            current.append(
                Instruction(
                    address=int(found[1], 16),
                    opcode=found[3],
                    operands=found[4],
                    stall=bits >> 41 & 0xF,
                    sets=bits >> 46 & 0x7,
                    waits=bits >> 52 & 0x3F,
                    guarded=found[2] is not None or found[4].strip().startswith(("P", "!P", "U")),
                )
            )
    return kernels


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of all loops: the instructions between a backward branch and its target."""
    place = {one.address: i for i, one in enumerate(code)}
    ends: dict[int, int] = {}
    for i, one in enumerate(code):
        start = place.get(one.target) if one.target is not None else None
        if start is not None and start < i:
            ends[start] = max(ends.get(start, 0), i)
    return [code[start : end + 1] for start, end in sorted(ends.items())]


def innermost(bodies: list[list[Instruction]]) -> list[list[Instruction]]:
    """The loops that contain no other loop."""
    spans = [(body[0].address, body[-1].address) for body in bodies]

    def holds_another(span: tuple[int, int]) -> bool:
        return any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)

    return [body for body, span in zip(bodies, spans, strict=True) if not holds_another(span)]


def shortest_path(
    loop: list[Instruction],
    stops: list[Instruction],
    counted: Callable[[Instruction], bool] = lambda one: False,
    least: int = 0,
) -> list[Instruction]:
    """One round of a loop: from its first instruction through `stops`, in this order, and through
    at least `least` of the counted instructions, to the branch that repeats it, with the fewest
    stall cycles. So code that a branch can avoid is left out.

    Raises:
        ValueError: there is no such path.
    """
    place = {one.address: i for i, one in enumerate(loop)}
    order = [place[one.address] for one in stops]

    def passed(i: int, stopped: int, count: int) -> tuple[int, int, int]:
        stopped += stopped < len(order) and order[stopped] == i
        return i, stopped, min(least, count + counted(loop[i]))

    def followers(i: int) -> list[int]:
        one = loop[i]
        to = place.get(one.target) if one.target is not None else None
        ends = not one.guarded and (one.target is not None or base(one) in ("EXIT", "RET"))
        both = (to, None if ends else i + 1)
        return [n for n in both if n is not None and 0 < n < len(loop)]  # not another round

    first, goal = passed(0, 0, 0), (len(loop) - 1, len(stops), least)
    before: dict[tuple[int, int, int], tuple[int, int, int] | None] = {}
    queue: list[Any] = [(0, first, None)]
    while queue and goal not in before:
        cycles, state, previous = heapq.heappop(queue)
        if state in before:
            continue
        before[state] = previous
        for n in followers(state[0]):
            heapq.heappush(queue, (cycles + loop[state[0]].stall, passed(n, *state[1:]), state))
    if goal not in before:
        raise ValueError(f"no way through {[one.opcode for one in stops]} in a loop")
    path, at = [], goal
    while at is not None:
        path.append(loop[at[0]])
        at = before[at]
    return path[::-1]


def cycles_of(body: list[Instruction]) -> int:
    """Stall cycles of some instructions."""
    return sum(one.stall for one in body)


def base(one: Instruction) -> str:
    """The opcode without its modifiers."""
    return one.opcode.partition(".")[0]


def width(one: Instruction) -> int:
    """Bits per lane of a load or store."""
    for part in one.opcode.split(".")[1:]:
        if part in ("64", "128"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32
