# SPDX-License-Identifier: Apache-2.0
"""A report on the machine code of the CUDA kernels for sm_90a, without a GPU.

``python -m tools.gpu.machine_code [OBJECT] [--json FILE]`` disassembles a library or an object file
(default: the built library) with cuobjdump, from PATH or from Triton's wheel, and says per kernel:

- registers, and bytes of stack and local memory;
- loops around bulk copies (UBLKCP, UTMALDG): stall cycles per copy, and whether the copy itself is
  in a loop over lanes (``BRA.U.ANY``), which a copy whose address is not uniform becomes;
- the producer's loop over stages: stall cycles of its shortest path through the wait for a slot,
  the announcement and the copies, and those of each further block and box;
- loops of the consumers, those around HMMA: stall cycles, instructions, shared loads by width;
- loops with loads from global memory: how many are issued before the first waits for one of them;
- loops that poll: fences in them, and the fences that follow;
- what orders memory accesses: releases, acquires, the copy engine's fences;
- loops of ordinary loads and stores (the loss): their widths, and loads in flight;
- MEMBAR.SC in loops.

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
from pathlib import Path
from typing import Any

from . import limits
from .listing import (
    Instruction,
    base,
    cycles_of,
    innermost,
    loops,
    parse,
    shortest_path,
    width,
)
from .processes import ROOT, run_command

ARCH = "sm_90a"
ANNOUNCEMENT, WAIT = "SYNCS.ARRIVE.TRANS64", "SYNCS.PHASECHK"  # of an mbarrier
COPIES, PRODUCTS = ("UBLKCP", "UTMALDG"), ("HMMA", "IMMA")
_LANE_LOOP_REACH = 12  # instructions after a copy in which its own loop over lanes would end
_NO_BARRIER = 7  # of scoreboards: none
_LONGEST_POLL = 8  # instructions of a loop that polls, and after it until its fence has ended
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def _is_exponential(one: Instruction) -> bool:
    """expf begins with it."""
    return one.opcode == "FFMA.SAT"


def _is_power_of_two(one: Instruction) -> bool:
    """expf ends with it."""
    return one.opcode == "MUFU.EX2"


def _copy_loops(code: list[Instruction], bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The smallest loop around each copy. A loop over lanes is recognised by its final branch."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    place = {one.address: i for i, one in enumerate(code)}
    for one in [one for one in code if base(one) in COPIES]:
        around = [b for b in bodies if b[0].address <= one.address <= b[-1].address]
        after = code[place[one.address] : place[one.address] + _LANE_LOOP_REACH]
        by_lanes = any(other.opcode == "BRA.U.ANY" for other in after)
        body = min(around, key=len) if around else [one]
        copies = sum(base(other) in COPIES for other in body)
        found[body[0].address, body[-1].address] = {
            "copies": copies,
            "kind": base(one),
            "by_lanes": by_lanes,
            "stall_cycles_per_copy": round(sum(other.stall for other in body) / copies, 1),
        }
    return list(found.values())


FENCES = ("MEMBAR", "CCTL.IVALL", "FENCE")


def _fences(body: list[Instruction]) -> int:
    return sum(one.opcode.startswith(FENCES) for one in body)


def _producers(bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The loops over stages: those that wait for a slot, announce its bytes and copy.

    The copies of weights are in a loop over blocks and one over boxes; the last copy is that of
    hidden states. "cycles" counts one block and one box of each matrix.
    """
    found = []
    announcements = {one.address: one for b in bodies for one in b if one.opcode == ANNOUNCEMENT}
    for announced in announcements.values():
        around = [b for b in bodies if b[0].address <= announced.address <= b[-1].address]
        waiting = [b for b in around if any(one.opcode.startswith(WAIT) for one in b)]
        loop = min(waiting, key=len, default=[])
        copies = [one for one in loop if base(one) in COPIES]
        if sum(one.opcode == ANNOUNCEMENT for one in loop) != 1 or len(copies) < 2:
            continue
        wait = next(one for one in loop if one.opcode.startswith(WAIT))
        *weights, hidden = copies
        nests = {
            one.address: sorted(
                (b for b in bodies if b[0].address <= one.address <= b[-1].address), key=len
            )
            for one in copies
        }
        path = shortest_path(loop, [wait, announced, *weights])
        with_hidden = shortest_path(loop, [wait, announced, *copies])
        found.append(
            {
                "cycles": cycles_of(path),
                "cycles_with_hidden": cycles_of(with_hidden),
                "per_block": max(cycles_of(nests[one.address][1]) for one in weights),
                "per_box": max(cycles_of(nests[one.address][0]) for one in weights),
                "per_hidden_box": cycles_of(nests[hidden.address][0]),
                "fences": _fences(path),
            }
        )
    return found


def _polls(code: list[Instruction], inner: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The loops that wait for a value in global memory: our counters, and the toolkit's grid
    barrier, which loads with generic addresses."""
    place = {one.address: i for i, one in enumerate(code)}
    found = []
    for loop in inner:
        loads = [one for one in loop if base(one) in ("LDG", "LD") and "STRONG" in one.opcode]
        if not loads or len(loop) > _LONGEST_POLL:
            continue
        end = place[loop[-1].address] + 1
        after = code[end : end + _LONGEST_POLL]
        found.append(
            {
                "of": "counter" if base(loads[0]) == "LDG" else "grid barrier",
                "sleeps": any(base(one) == "NANOSLEEP" for one in loop),
                "fences": _fences(loop),
                "fences_after": sum(one.opcode.startswith("MEMBAR.ALL.GPU") for one in after),
            }
        )
    return found


_REACH = 4  # instructions between a fence and what it belongs to


def _order(code: list[Instruction]) -> dict[str, int]:
    """The instructions that order memory accesses, without those of the toolkit's grid barrier.

    - "releases": increments of a counter right behind a fence (red.release).
    - "acquires": loads of a counter with a fence behind them that drops the multiprocessor's cache.
    - "copy_fences": before the copy engine reads global memory that the grid wrote.
    - "unfenced_mbarriers": mbarriers whose initialisation the copy engine may not see.
    """
    found = Counter(releases=0, acquires=0, copy_fences=0, unfenced_mbarriers=0)
    for i, one in enumerate(code):
        before, after = code[max(0, i - _REACH) : i], code[i + 1 : i + 1 + _REACH]
        if base(one) == "REDG" and "STRONG.GPU" in one.opcode:
            found["releases"] += any(o.opcode == "MEMBAR.ALL.GPU" for o in before)
        elif one.opcode == "MEMBAR.ALL.GPU":
            loads = code[max(0, i - 2 * _REACH) : i]
            found["acquires"] += any(
                base(o) == "LDG" and "STRONG.GPU" in o.opcode for o in loads
            ) and any(o.opcode == "CCTL.IVALL" for o in after)
        elif one.opcode == "FENCE.VIEW.ASYNC.G":
            found["copy_fences"] += 1
        elif one.opcode.startswith("SYNCS.EXCH"):
            fenced = any(o.opcode == "FENCE.VIEW.ASYNC.S" for o in after)
            found["unfenced_mbarriers"] += not fenced
    return dict(found)


def _element_loops(inner: list[list[Instruction]]) -> list[dict[str, Any]]:
    """Loops over logits that load and perhaps store four elements per access: those of
    the loss. Counted is the shortest path through every wide access and an exponential for each
    logit, so without the soft cap and single elements."""
    found = []
    for loop in inner:
        wide = [one for one in loop if base(one) in ("LDG", "STG") and width(one) == 128]
        loads = [one for one in wide if base(one) == "LDG"]
        if not loads or sum(map(_is_exponential, loop)) < 4 * len(loads):
            continue
        path = shortest_path(loop, wide, _is_exponential, 4 * len(loads))
        overlap = path[path.index(loads[-1]) :]
        pending = 0
        for one in loads:
            pending |= 1 << one.sets
        before = next((i for i, one in enumerate(overlap) if one.waits & pending), len(overlap))
        found.append(
            {
                "instructions": len(path),
                "stall_cycles": cycles_of(path),
                "cycles_before_wait": cycles_of(overlap[:before]),
                "wide_loads": len(loads),
                "wide_stores": len(wide) - len(loads),
                "local_accesses": sum(base(one) in ("LDL", "STL") for one in path),
            }
        )
    return found


def _consumer_loops(bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The innermost loops with products, and the loop around each, in which the operands are read
    and unpacked."""
    found: dict[int, dict[str, Any]] = {}
    for inner in innermost(bodies):
        if not any(base(one) in PRODUCTS for one in inner):
            continue
        start, end = inner[0].address, inner[-1].address
        around = [
            b
            for b in bodies
            if len(b) > len(inner) and b[0].address <= start and end <= b[-1].address
        ]
        body = min(around, key=len) if around else inner
        shared = [one for one in body if base(one) in ("LDS", "LDSM")]
        if shared:
            widths = Counter("LDSM" if base(o) == "LDSM" else str(width(o)) for o in shared)
            found[body[0].address] = {
                "products": sum(base(one) in PRODUCTS for one in body),
                "instructions": len(body),
                "stall_cycles": sum(one.stall for one in body),
                "shared_loads": dict(sorted(widths.items())),
                "local_accesses": sum(base(one) in ("LDL", "STL") for one in inner),
            }
    return list(found.values())


def _finish_loops(inner: list[list[Instruction]]) -> list[dict[str, Any]]:
    """The loops that turn a tile's sums into logits: they move them through shared memory.

    "rows": of the batch, that a warp finishes in one round; "cycles": stall cycles of the shortest
    way with all of these sums and the exponential of each.
    """
    found = []
    for body in inner:
        stores = [one for one in body if base(one) == "STS"]
        loads = [one for one in body if base(one) == "LDS"]
        loads = [one for one in loads if stores and one.address > stores[0].address]
        parts = [one for one in body if one.opcode == "STG.E.64"]
        if not loads or not parts or any(base(one) in PRODUCTS + COPIES for one in body):
            continue
        entries = sum(width(one) // 32 for one in loads) // 2  # of a lane, of two matrices
        paths = [
            shortest_path(body, [*stores, *loads, part], _is_power_of_two, entries)
            for part in parts
        ]
        found.append({"rows": 4 * entries, "cycles": min(map(cycles_of, paths))})
    return found


def loads_before_a_wait(body: list[Instruction]) -> int:
    """Number of loads from global memory that a loop's body issues before it waits for one."""
    pending, count = 0, 0
    for one in body:
        if one.waits & pending:
            break
        if base(one) in ("LDG", "LD"):
            count += 1
            pending |= 1 << one.sets if one.sets != _NO_BARRIER else 0
    return count


def _global_loops(bodies: list[list[Instruction]]) -> list[dict[str, Any]]:
    found = []
    for body in bodies:
        loads = [one for one in body if base(one) in ("LDG", "LD")]
        if loads:
            found.append(
                {
                    "loads": len(loads),
                    "before_a_wait": loads_before_a_wait(body),
                    "bits": min(width(one) for one in loads),
                    "products": sum(base(one) == "HMMA" for one in body),
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
        "traps": any(base(one) == "BPT" and ".TRAP" in one.opcode for one in code),
        "copy_loops": _copy_loops(code, bodies),
        "consumer_loops": _consumer_loops(bodies),
        "global_loops": _global_loops(inner),
        "producers": _producers(bodies),
        "polls": _polls(code, inner),
        "order": _order(code),
        "element_loops": _element_loops(inner),
        "finish_loops": _finish_loops(inner),
        "membar_sc_in_loops": sum(one.opcode.startswith("MEMBAR.SC") for one in in_loops),
    }


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


PARTS = ("copy_loops", "producers", "consumer_loops", "global_loops", "polls", "element_loops")


def in_words(reports: dict[str, dict[str, Any]]) -> str:
    """The reports as text for a terminal."""
    lines = []
    for name, one in reports.items():
        lines.append(
            f"{name}: {one['instructions']} instructions, {one['registers']} registers, "
            f"{one['local_bytes'] + one['stack_bytes']} bytes of stack and local memory; in loops "
            f"{one['membar_sc_in_loops']} MEMBAR.SC"
        )
        for part in PARTS:
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
        if name.startswith("stream_kernel") and one["copy_loops"]:
            format = name.partition("<")[2].partition(",")[0]
            for producer in one["producers"]:
                print(f"{name}: share of issue cycles: {limits.issue_shares(producer, format)}")
            over = limits.violations(one, format)
        elif name.startswith("loss_rows"):
            for loop in one["element_loops"]:
                rate = limits.bytes_per_clock(loop, one["registers"])
                print(f"{name}: {rate:.1f} bytes per clock of a multiprocessor")
            over = limits.loss_violations(one, "backward" in name)
        else:
            over = limits.fence_violations(one)
        print(f"{name}: over the limits: {'; '.join(over) or 'nothing'}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
