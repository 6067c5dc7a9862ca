# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles, and the hot kernels keep their limits of registers and spills.

The slow tests compile for sm_80, sm_90a and sm_100. The resources are those that ptxas reports, so
the tests need nvcc, but no GPU.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_backend import ROOT, incremental, libraries, toolchain

from tools.gpu.machine_code import find_tool, short_name


@dataclass(frozen=True)
class Limit:
    """registers: per thread.

    With n threads per block, a multiprocessor's 65536 registers allow 65536 / (n * registers)
    resident blocks. A grid barrier needs all blocks to be resident.
    """

    registers: int
    spill_bytes: int = 0
    stack_bytes: int = 0


# Hot kernels, by a part of their name. All other kernels must not spill at all.
LIMITS = {
    "decode_step_kernel": Limit(registers=128),  # 256 threads: two blocks per multiprocessor
    # 384 threads: one block, whose ring buffer fills the multiprocessor's shared memory. A spilled
    # value is used once per stage, tile or launch. test_machine_code.py allows no spill among the
    # products.
    "stream_kernel": Limit(registers=168, spill_bytes=592, stack_bytes=192),
    # 256 threads: four blocks or more, for enough reads in flight
    "loss_rows_kernel": Limit(registers=64),
    "loss_rows_backward_kernel": Limit(registers=64),
}


@dataclass(frozen=True)
class Resources:
    """The resources of one kernel on one architecture, as ptxas reports them."""

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
    """The resources of each entry function, with the functions that it calls, from a log of ``nvcc
    -Xptxas=-v``.

    Raises ValueError if lines of a kernel are missing: otherwise a log that cannot be read would
    pass as one without spills.
    """
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
    """archs: the requested architectures in ptxas' names; ptx: those of which PTX was asked for.
    kernels: resources by object file.
    """

    archs: set[str]
    ptx: set[str]
    kernels: dict[Path, list[Resources]]


LISTS = [toolchain.TESTED_ARCHS, pytest.param(toolchain.DEFAULT_ARCHS, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=LISTS)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """The objects of `make build` for these architectures. Objects that are out of date are
    compiled.
    """
    archs = request.param.split(";")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALHEAD_CUDA", "1")
        tools = libraries.find_tools()
        folder = ROOT / "build" / ("objects" if tools.archs == archs else "gate")
        patch.setenv("TORCH_CUDA_ARCH_LIST", request.param)
        steps = [s for s in libraries.compile_steps("cuda", folder, tools) if ".cu" in s.title]
        with incremental.build_lock(folder):
            incremental.run_steps(steps)
    names = {arch: f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in archs}
    ptx = {name for arch, name in names.items() if arch.endswith("+PTX")}
    return Compiled(
        set(names.values()),
        ptx,
        {step.output: parse_resources(step.log.read_text()) for step in steps},
    )


@needs_nvcc
def test_every_kernel_is_compiled_for_every_arch(compiled):
    assert compiled.kernels
    for source, kernels in compiled.kernels.items():
        assert kernels, f"{source}: ptxas reports no kernel"
        for name in {one.kernel for one in kernels}:
            archs = {one.arch for one in kernels if one.kernel == name}
            # For sm_100 the library also has PTX, but ptxas compiles it only once.
            assert archs == compiled.archs, f"{source}: {name} is compiled for {sorted(archs)}"


@needs_nvcc
def test_each_arch_has_code_for_its_own_copy_engine(compiled):
    """A step is launched by the architecture that its code was compiled for; the kernels of the
    other copy engine are empty but for a trap (test_machine_code.py), so they need few registers.
    """
    seen = set()
    for one in (one for kernels in compiled.kernels.values() for one in kernels):
        name = re.fullmatch(r"stream_kernel<\w+, ([01]), [01]>", short_name(one.kernel))
        if name is None:
            continue
        boxes, own = name[1] == "1", int(re.sub(r"\D", "", one.arch)) >= 90
        assert (one.registers > 100) == (boxes == own), f"{one.kernel} on {one.arch}"
        seen.add((one.arch, boxes))
    assert seen == {(arch, boxes) for arch in compiled.archs for boxes in (False, True)}


@needs_nvcc
def test_ptx_is_kept_where_it_was_asked_for(compiled):
    """A device that is newer than all architectures compiles it."""
    tool = find_tool()
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed Triton")
    for path in compiled.kernels:
        listed = subprocess.run([tool, "-lptx", str(path)], capture_output=True, text=True).stdout
        assert set(re.findall(r"\.(sm_\w+)\.ptx", listed)) == compiled.ptx, path


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


# --- that the limits are enforced -----------------------------------------------------------------

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
    """128 live values in 64 registers, with the real compiler, flags and log format."""
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
    if line == 1:  # without its first line, the log names no kernel
        assert parse_resources("".join(lines)) == []
        return
    with pytest.raises(ValueError, match="not as ptxas reports"):
        parse_resources("".join(lines))
