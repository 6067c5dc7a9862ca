# SPDX-License-Identifier: Apache-2.0
"""Compilers and their flags: $CXX or the system's C++ compiler, and nvcc if it is found.

nvcc is called directly. torch.utils.cpp_extension refuses to build CUDA code beside a CPU-only
torch, and if nvcc on PATH is a wrapper script, it takes the folder above the script for the
toolkit's root.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"
# The default beside a CPU-only torch. Nothing runs there, but tests read this architecture's code.
TESTED_ARCHS = "9.0a"
DEFAULT_CUDA_ROOT = "/usr/local/cuda"


def _flags(name: str) -> list[str]:
    lines = Path(__file__).with_name(name).read_text().splitlines()
    return [line for line in lines if line.startswith("-")]


# CMakeLists.txt reads the same files.
CXX_FLAGS = _flags("cxx_flags.txt")
NVCC_FLAGS = _flags("nvcc_flags.txt")


class BuildError(Exception):
    """A build error, as one sentence for the person who builds."""


def find_cxx() -> list[str]:
    """The C++ compiler as the start of a command line."""
    if os.environ.get("CXX", "").strip():
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX names the C++ compiler {command[0]!r}, which is not found.")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError(
        "no C++ compiler found: install g++ (Debian, Ubuntu: apt install g++) or set CXX to one."
    )


@dataclass(frozen=True)
class Nvcc:
    program: str
    version: str

    def library_folders(self) -> list[Path]:
        """The folders of libcudart_static.a, as nvcc reports them.

        If the program is a wrapper script, its path does not tell the toolkit's root.
        """
        trace = subprocess.run(
            [self.program, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        line = re.search(r"(?m)^#\$ LIBRARIES=(.*)$", trace)
        folders = re.findall(r'-L([^"]+)"', line[1]) if line else []
        folders = [Path(folder) for folder in folders if Path(folder).name != "stubs"]
        if not any((folder / "libcudart_static.a").is_file() for folder in folders):
            raise BuildError(f"{self.program} has no libcudart_static.a beside it.")
        return folders


def find_nvcc() -> Nvcc | None:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), DEFAULT_CUDA_ROOT]
    places = [str(Path(root, "bin", "nvcc")) for root in roots if root] + ["nvcc"]
    program = next((path for path in map(shutil.which, places) if path), None)
    if program is None:
        return None
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    if version is None:
        raise BuildError(f"{program} --version does not name a CUDA release.")
    return Nvcc(program, version[1])


def choose_cuda(torch_cuda: str | None) -> Nvcc | None:
    """The nvcc to build the CUDA library with, or None, by DUALHEAD_CUDA = auto | nvcc | 0 | 1.

    torch_cuda: the CUDA version of the torch that will load the library; None if it is CPU-only. A
    CPU-only torch cannot load the library, so "auto" then saves the minutes that compiling takes.
    """
    switch = os.environ.get("DUALHEAD_CUDA", "auto")
    if switch not in ("auto", "nvcc", "0", "1"):
        raise BuildError(f"DUALHEAD_CUDA must be auto, nvcc, 0 or 1, got {switch!r}.")
    if switch == "0" or (switch == "auto" and torch_cuda is None):
        return None
    nvcc = find_nvcc()
    if nvcc is None and switch == "1":
        raise BuildError(
            "DUALHEAD_CUDA=1 asks for the CUDA library, but no nvcc was found in CUDA_HOME, "
            f"CUDA_PATH, {DEFAULT_CUDA_ROOT} or PATH: install the CUDA toolkit or unset it."
        )
    return nvcc


def cuda_archs(torch_cuda: str | None) -> list[str]:
    """The architectures in TORCH_CUDA_ARCH_LIST, in torch's syntax: '8.0;9.0a' or '8.0 9.0+PTX'.

    torch_cuda: as in choose_cuda. It decides the default.
    """
    default = TESTED_ARCHS if torch_cuda is None else DEFAULT_ARCHS
    archs = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    archs = [arch for arch in archs if arch] or default.split(";")
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must list archs like 8.0;9.0a;10.0+PTX, got {arch!r}."
            )
    return archs


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number}" + (f",compute_{number}" if arch.endswith("+PTX") else "")
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    return flags
