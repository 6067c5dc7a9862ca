# SPDX-License-Identifier: Apache-2.0
"""The compile gate: every CUDA kernel compiles (the slow tests: for sm_80, sm_90a and sm_100), and
the hot ones stay within their limits of registers and spills. Needs nvcc, no GPU: ptxas says what
it allotted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_backend import ROOT, incremental, libraries, toolchain


@dataclass(frozen=True)
class Limit:
    """registers: per thread. A kernel of n threads per block has 65536 / n of them per resident
    block; a barrier of the grid needs all blocks resident."""

    registers: int
    spill_bytes: int = 0
    stack_bytes: int = 0


# Hot kernels by a part of their name. A kernel named nowhere must not spill at all.
LIMITS = {
    "decode_step_kernel": Limit(registers=128),  # 256 threads: two blocks per multiprocessor
    # 384 threads: one block, whose ring fills the multiprocessor's shared memory. What is spilled
    # is used once per stage, tile or launch: test_machine_code.py allows none among the products.
    "stream_kernel": Limit(registers=168, spill_bytes=416, stack_bytes=96),
    # 256 threads: four blocks or more, for enough reads in flight
    "loss_rows_kernel": Limit(registers=64),
    "loss_rows_backward_kernel": Limit(registers=64),
}


@dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int


_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\w+)' for '(\w+)'")
_PROPERTIES = re.compile(r"ptxas info\s*: Function properties for (\w+)")
_STACK = re.compile(
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_REGISTERS = re.compile(r"ptxas info\s*: Used (\d+) registers")


def parse_resources(log: str) -> list[Resources]:
    """Each entry function of a log of ``nvcc -Xptxas=-v``, with the functions that it calls. Raises
    ValueError for one whose lines are incomplete: a log that cannot be read must not pass for one
    without spills."""
    found = []
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", log)[1:]:
        entry, properties = _ENTRY.match(block), _PROPERTIES.search(block)
        registers, called = _REGISTERS.search(block), _PROPERTIES.findall(block)
        stacks = [[int(number) for number in stack] for stack in _STACK.findall(block)]
        complete = entry and properties and registers and len(stacks) == len(called)
        if not complete or properties[1] != entry[1]:
            raise ValueError(f"not as ptxas reports a kernel: {block}")
        frame, stores, loads = (sum(column) for column in zip(*stacks, strict=True))
        found.append(Resources(entry[1], entry[2], int(registers[1]), frame, stores + loads))
    return found


def violations(resources: Resources, limit: Limit) -> list[str]:
    pairs = (
        ("spill_bytes", resources.spill_bytes, limit.spill_bytes),
        ("stack_bytes", resources.stack_bytes, limit.stack_bytes),
        ("registers", resources.registers, limit.registers),
    )
    return [f"{name} {got}, at most {most}" for name, got, most in pairs if got > most]


needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="needs nvcc")


@dataclass(frozen=True)
class Compiled:
    """archs: those asked for, as ptxas names them. kernels: resources by object file."""

    archs: set[str]
    kernels: dict[Path, list[Resources]]


LISTS = [toolchain.TESTED_ARCHS, pytest.param(toolchain.DEFAULT_ARCHS, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=LISTS)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """The objects of `make build` where it has these architectures; compiled now if out of date."""
    archs = request.param.split(";")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALHEAD_CUDA", "1")
        tools = libraries.find_tools()
        folder = ROOT / "build" / ("objects" if tools.archs == archs else "gate")
        patch.setenv("TORCH_CUDA_ARCH_LIST", request.param)
        steps = [s for s in libraries.compile_steps("cuda", folder, tools) if ".cu" in s.title]
        with incremental.build_lock(folder):
            incremental.run_steps(steps)
    names = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in archs}
    return Compiled(names, {step.output: parse_resources(step.log.read_text()) for step in steps})


@needs_nvcc
def test_every_kernel_is_compiled_for_every_arch(compiled):
    assert compiled.kernels
    for source, kernels in compiled.kernels.items():
        assert kernels, f"{source}: ptxas reports no kernel"
        for name in {one.kernel for one in kernels}:
            archs = {one.arch for one in kernels if one.kernel == name}
            # sm_100 comes with its PTX, which ptxas sees once.
            assert archs == compiled.archs, f"{source}: {name} is compiled for {sorted(archs)}"


@needs_nvcc
@pytest.mark.parametrize("name", list(LIMITS))
def test_hot_kernels_keep_their_limits(compiled, name):
    hot = [one for kernels in compiled.kernels.values() for one in kernels if name in one.kernel]
    assert {one.arch for one in hot} == compiled.archs, f"no kernel is named {name}: correct LIMITS"
    for one in hot:
        found = violations(one, LIMITS[name])
        assert not found, f"{one.kernel} on {one.arch}: {'; '.join(found)}"


@needs_nvcc
def test_no_other_kernel_spills(compiled):
    for kernels in compiled.kernels.values():
        for one in kernels:
            named = any(name in one.kernel for name in LIMITS)
            assert named or one.spill_bytes == 0, f"{one.kernel} on {one.arch} spills"


# --- that the gate can close ----------------------------------------------------------------------

SPILLING = """
__global__ void __launch_bounds__(1024) greedy(const float* in, float* out) {
  float held[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) held[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) out[i * 1024 + threadIdx.x] = held[i] * held[127 - i];
}
"""


@needs_nvcc
def test_a_spill_is_seen(tmp_path):
    """128 live values, 64 registers: the real compiler, flags and log format."""
    source, output = tmp_path / "greedy.cu", tmp_path / "greedy.o"
    source.write_text(SPILLING)
    command = [toolchain.find_nvcc().program, *toolchain.NVCC_FLAGS]
    command += [*toolchain.gencode_flags(["9.0a"]), "-c", str(source), "-o", str(output)]
    step = incremental.Step(output, command, "compile greedy.cu")
    step.run()
    (found,) = parse_resources(step.log.read_text())
    assert (found.arch, found.registers) == ("sm_90a", 64)
    assert found.spill_bytes > 0
    assert violations(found, Limit(registers=64, stack_bytes=10_000))


BLOCK = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fooPf' for 'sm_80'
ptxas info    : Function properties for _Z4fooPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 792 bytes cmem[0]
ptxas info    : Compile time = 1742.007 ms
"""


def test_logs_are_read():
    (found,) = parse_resources(BLOCK)
    assert found == Resources("_Z4fooPf", "sm_80", 96, 16, 20)
    assert violations(found, Limit(registers=96, spill_bytes=20, stack_bytes=16)) == []
    assert violations(found, Limit(registers=95)) == [
        "spill_bytes 20, at most 0",
        "stack_bytes 16, at most 0",
        "registers 96, at most 95",
    ]
    assert len(parse_resources(BLOCK + BLOCK)) == 2
    called = "ptxas info    : Function properties for _Z3barPf\n"
    called += "    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n"
    (found,) = parse_resources(BLOCK + called)
    assert found == Resources("_Z4fooPf", "sm_80", 96, 24, 24)


@pytest.mark.parametrize("line", range(1, 5))
def test_incomplete_logs_do_not_pass(line):
    lines = BLOCK.splitlines(keepends=True)
    del lines[line]
    if line == 1:  # without its first line there is no kernel at all
        assert parse_resources("".join(lines)) == []
        return
    with pytest.raises(ValueError, match="not as ptxas reports"):
        parse_resources("".join(lines))
