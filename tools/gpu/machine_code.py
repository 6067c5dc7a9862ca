# SPDX-License-Identifier: Apache-2.0
"""A report on the machine code of the CUDA kernels for sm_90a, without a GPU.

``python -m tools.gpu.machine_code [OBJECT] [--json FILE]`` disassembles a library or an object file
(default: the built library) with cuobjdump, from PATH or from Triton's wheel, and says per kernel:

- registers, and bytes of stack and local memory;
- loops around bulk copies (UBLKCP, UTMALDG): stall cycles per copy, and whether the copy itself is
  in a loop over lanes (``BRA.U.ANY``), which a copy whose address is not uniform becomes;
- loops of the consumers, those around HMMA: stall cycles, instructions, shared loads by width;
- loops with loads from global memory: how many are issued before the first waits for one of them;
- fences in loops: MEMBAR.SC, and CCTL.IVALL, which empties L1.

The stall cycles are those that the compiler encodes in each instruction: how long a warp waits
before its next instruction. Waiting for memory is not included, so they are a lower bound.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import ROOT, run_command

ARCH = "sm_90a"
COPIES, PRODUCTS = ("UBLKCP", "UTMALDG"), ("HMMA", "IMMA")
_LANE_LOOP_REACH = 12  # instructions after a copy in which its own loop over lanes would end
_NO_BARRIER = 7  # of scoreboards: none
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);\s*/\* 0x[0-9a-f]{16} \*/"
)
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_FUNCTION = re.compile(r"Function : (\S+)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel.

    Attributes:
        opcode: the opcode with its modifiers, such as "LDS.128".
        operands: the rest of its text.
        stall: cycles until the warp's next instruction.
        sets: the scoreboard that its result signals, or 7.
        waits: bit mask of the scoreboards that it waits for.
    """

    address: int
    opcode: str
    operands: str
    stall: int
    sets: int
    waits: int

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
                )
            )
    return {name: code for name, code in kernels.items() if len(code) > 32}


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


def _base(one: Instruction) -> str:
    return one.opcode.partition(".")[0]


def _width(one: Instruction) -> int:
    """Bits per lane that a load takes."""
    for part in one.opcode.split(".")[1:]:
        if part in ("64", "128"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def _copy_loops(code: list[Instruction], bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The smallest loop around each copy. A loop over lanes is recognised by its final branch."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    place = {one.address: i for i, one in enumerate(code)}
    for one in [one for one in code if _base(one) in COPIES]:
        around = [b for b in bodies if b[0].address <= one.address <= b[-1].address]
        after = code[place[one.address] : place[one.address] + _LANE_LOOP_REACH]
        by_lanes = any(other.opcode == "BRA.U.ANY" for other in after)
        body = min(around, key=len) if around else [one]
        copies = sum(_base(other) in COPIES for other in body)
        found[body[0].address, body[-1].address] = {
            "copies": copies,
            "kind": _base(one),
            "by_lanes": by_lanes,
            "stall_cycles_per_copy": round(sum(other.stall for other in body) / copies, 1),
        }
    return list(found.values())


def _consumer_loops(bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The innermost loops with products, and the loop around each, in which the operands are read
    and unpacked."""
    found: dict[int, dict[str, Any]] = {}
    for inner in innermost(bodies):
        if not any(_base(one) in PRODUCTS for one in inner):
            continue
        start, end = inner[0].address, inner[-1].address
        around = [
            b
            for b in bodies
            if len(b) > len(inner) and b[0].address <= start and end <= b[-1].address
        ]
        body = min(around, key=len) if around else inner
        shared = [one for one in body if _base(one) in ("LDS", "LDSM")]
        if shared:
            widths = Counter("LDSM" if _base(o) == "LDSM" else str(_width(o)) for o in shared)
            found[body[0].address] = {
                "products": sum(_base(one) in PRODUCTS for one in body),
                "instructions": len(body),
                "stall_cycles": sum(one.stall for one in body),
                "shared_loads": dict(sorted(widths.items())),
                "local_accesses": sum(_base(one) in ("LDL", "STL") for one in inner),
            }
    return list(found.values())


def loads_before_a_wait(body: list[Instruction]) -> int:
    """Number of loads from global memory that a loop's body issues before it waits for one."""
    pending, count = 0, 0
    for one in body:
        if one.waits & pending:
            break
        if _base(one) in ("LDG", "LD"):
            count += 1
            pending |= 1 << one.sets if one.sets != _NO_BARRIER else 0
    return count


def _global_loops(bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    found = []
    for body in bodies:
        loads = [one for one in body if _base(one) in ("LDG", "LD")]
        if loads:
            found.append(
                {
                    "loads": len(loads),
                    "before_a_wait": loads_before_a_wait(body),
                    "bits": min(_width(one) for one in loads),
                    "products": sum(_base(one) == "HMMA" for one in body),
                    "polls": any("STRONG" in one.opcode for one in loads),
                }
            )
    return found


def report_of(code: list[Instruction]) -> dict[str, Any]:
    """The figures of one kernel."""
    bodies = loops(code)
    inner = innermost(bodies)
    in_loops = {one.address: one for body in bodies for one in body}.values()
    return {
        "instructions": len(code),
        "copy_loops": _copy_loops(code, bodies),
        "consumer_loops": _consumer_loops(bodies),
        "global_loops": _global_loops(inner),
        "membar_sc_in_loops": sum(one.opcode.startswith("MEMBAR.SC") for one in in_loops),
        "l1_wipes_in_loops": sum(one.opcode.startswith("CCTL.IVALL") for one in in_loops),
    }


# Limits of a streaming kernel. At a multiprocessor's share of the bandwidth, 16.5 bytes a clock, a
# box of 64 rows of 128 bytes takes 496 clocks; its copy may take the producer an eighth of them.
MOST_CYCLES_PER_COPY = 62
LEAST_LOADS_IN_FLIGHT = 8  # minimum in the gate's projections


def violations(one: dict[str, Any]) -> list[str]:
    """A sentence for each limit that the report of a streaming kernel exceeds.

    The limits of registers, and of spills outside these loops, are in
    python_tests/csrc/test_cuda_compile.py.
    """
    found = []
    if one["membar_sc_in_loops"]:
        found.append(f"{one['membar_sc_in_loops']} MEMBAR.SC in loops")
    for loop in one["copy_loops"]:
        if loop["by_lanes"]:
            found.append(f"{loop['kind']} in a loop over lanes")
        elif loop["stall_cycles_per_copy"] > MOST_CYCLES_PER_COPY:
            found.append(f"{loop['stall_cycles_per_copy']} stall cycles per copy")
    for loop in one["consumer_loops"]:
        if not set(loop["shared_loads"]) <= {"128", "LDSM"}:
            found.append(f"shared loads by width, {loop['shared_loads']}, beside products")
        if loop["local_accesses"]:
            found.append(f"{loop['local_accesses']} spilled registers among products")
    for loop in one["global_loops"]:
        if loop["products"] and loop["before_a_wait"] < LEAST_LOADS_IN_FLIGHT:
            found.append(f"a projection with {loop['before_a_wait']} loads before a wait")
    return sorted(set(found))


def short_name(mangled: str) -> str:
    """ "stream_kernel<int4, 1, 0>": readable, the same from build to build."""
    found = re.search(
        r"\d+(stream_kernel|decode_step_kernel|loss_rows\w*_kernel)(I.*?EE)?", mangled
    )
    if found is None:
        return mangled
    formats = ("bf16", "fp16", "int8", "fp8", "int4")
    numbers = re.findall(r"FormatE(\d)E", found[2] or "")
    flags = re.findall(r"Lb([01])E", found[2] or "")
    words = [formats[int(number)] for number in numbers] + flags
    return f"{found[1]}<{', '.join(words)}>" if words else found[1]


def find_tool() -> str | None:
    """cuobjdump from PATH, or from Triton's wheel."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None and shutil.which("nvdisasm") is not None:
        return on_path
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(beside) if beside.is_file() else None


def report(path: Path, limit: float = 300) -> dict[str, dict[str, Any]]:
    """Kernel -> report, for an object file or a library; empty if it has no code for sm_90a.

    Raises:
        RuntimeError: there is no cuobjdump, or it fails.
    """
    tool = find_tool()
    if tool is None:
        raise RuntimeError("cuobjdump is neither on PATH nor in an installed Triton")
    # Where to find nvdisasm.
    environment = {"PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}
    texts = []
    for option in ("-sass", "-res-usage"):
        done = run_command([tool, "-arch", ARCH, option, str(path)], limit, environment)
        if done.code != 0:
            raise RuntimeError(f"cuobjdump {option} {path}: {done.why}: {done.last_line.strip()}")
        texts.append(done.text)
    usage = {name: (reg, stack, local) for name, reg, stack, local in _USAGE.findall(texts[1])}
    found = {}
    for name, code in parse(texts[0]).items():
        registers, stack, local = map(int, usage[name])
        sizes = {"registers": registers, "stack_bytes": stack, "local_bytes": local}
        found[short_name(name)] = {**sizes, **report_of(code)}
    return found


def in_words(reports: dict[str, dict[str, Any]]) -> str:
    """The reports as text for a terminal."""
    lines = []
    for name, one in reports.items():
        lines.append(
            f"{name}: {one['instructions']} instructions, {one['registers']} registers, "
            f"{one['local_bytes'] + one['stack_bytes']} bytes of stack and local memory; in loops "
            f"{one['membar_sc_in_loops']} MEMBAR.SC, {one['l1_wipes_in_loops']} CCTL.IVALL"
        )
        for part in ("copy_loops", "consumer_loops", "global_loops"):
            rows = Counter(json.dumps(row) for row in one[part])
            lines += [f"  {part[:-1]} ({count}x): {row}" for row, count in rows.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    library = ROOT / "dualhead_ext" / "_C_cuda.so"
    parser.add_argument("object", nargs="?", type=Path, default=library)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to FILE")
    options = parser.parse_args(arguments)
    found = report(options.object)
    print(in_words(found))
    for name, one in found.items():
        if name.startswith("stream_kernel"):
            print(f"{name}: over the limits: {'; '.join(violations(one)) or 'nothing'}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
