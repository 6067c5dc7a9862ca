# SPDX-License-Identifier: Apache-2.0
"""The two libraries of the package.

_C.so holds the schemas and the CPU kernels and loads on every torch from 2.11 on. _C_cuda.so holds
the CUDA kernels. It is a separate file because it loads only on a CUDA build of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from incremental import ROOT, Step, build_lock, run_steps
from toolchain import (
    CXX_FLAGS,
    NVCC_FLAGS,
    BuildError,
    Nvcc,
    choose_cuda,
    cuda_archs,
    find_cxx,
    gencode_flags,
)
from torch_location import MINIMUM, Torch, find_torch

TORCH_MINIMUM = ".".join(map(str, MINIMUM))
CPU_LIBRARY = "_C.so"
CUDA_LIBRARY = "_C_cuda.so"
BUILD_INFO = "_build_info.json"
PRODUCTS = (CPU_LIBRARY, CUDA_LIBRARY, BUILD_INFO)


@dataclass(frozen=True)
class Tools:
    """The tools of a build. If nvcc is None, no CUDA library is built."""

    cxx: list[str]
    cxx_version: str
    nvcc: Nvcc | None
    torch: Torch

    @property
    def archs(self) -> list[str]:
        return cuda_archs(self.torch.cuda) if self.nvcc else []


def find_tools() -> Tools:
    torch = find_torch()
    if torch is None:
        raise BuildError(
            f"torch >= {TORCH_MINIMUM} is not installed in this environment, and its headers are "
            f"needed to compile: pip install 'torch>={TORCH_MINIMUM}' first, or build without "
            "--no-build-isolation."
        )
    cxx = find_cxx()
    text = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    return Tools(cxx, text.partition("\n")[0], choose_cuda(torch.cuda), torch)


def sources(kind: str) -> list[Path]:
    """The sources of one library, relative to ROOT. Bindings in *_cuda.cpp belong to the CUDA
    library.
    """
    bindings = sorted((ROOT / "csrc").glob("*.cpp"))
    if kind == "cuda":
        found = [path for path in bindings if path.stem.endswith("_cuda")]
        found += sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
    else:
        found = [path for path in bindings if not path.stem.endswith("_cuda")]
        found += sorted((ROOT / "csrc/kernels/cpu").glob("*.cpp"))
    return [path.relative_to(ROOT) for path in found]


def _binding_flags(torch: Torch) -> list[str]:
    return [
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION=0x{MINIMUM[0]:02x}{MINIMUM[1]:02x}000000000000",
        # Torch's headers put their own path into error messages: leave the build machine's path
        # out.
        f"-fmacro-prefix-map={torch.include}=torch",
        "-isystem",
        str(torch.include),
        "-isystem",
        str(torch.include / "torch" / "csrc" / "api" / "include"),
    ]


def _from_root(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def _host_compiler(cxx: list[str]) -> str:
    """The compiler in a command such as "ccache g++", for nvcc, which cannot use ccache."""
    return next(word for word in cxx if Path(word).name not in ("ccache", "sccache"))


def _compile_step(source: Path, folder: Path, tools: Tools) -> Step:
    output = folder / source.with_name(source.name + ".o")
    stamp = tools.cxx_version
    if source.suffix == ".cu":
        command = [tools.nvcc.program, *NVCC_FLAGS, *gencode_flags(tools.archs), "--threads=0"]
        command += ["-ccbin", _host_compiler(tools.cxx)]
        stamp += tools.nvcc.version
    else:
        command = [*tools.cxx, *CXX_FLAGS]
        # csrc/*.cpp are the bindings; the kernels below csrc/ do not use torch
        if len(source.parts) == 2:
            command += _binding_flags(tools.torch)
            stamp += tools.torch.version
        if source.stem.endswith("_cuda"):
            # Declares the function of the stable ABI that returns the current CUDA stream
            command += ["-DUSE_CUDA"]
    command += ["-Icsrc", "-MMD", "-MF", _from_root(output) + ".d"]
    command += ["-c", str(source), "-o", _from_root(output)]
    return Step(output, command, f"compile {source}", stamp)


def _link_step(output: Path, objects: list[Path], tools: Tools, cuda: bool) -> Step:
    command = [*tools.cxx, "-shared", "-o", _from_root(output), *map(_from_root, objects)]
    # Nothing in libtorch.so is used, but the library must name it: in a CUDA build of torch,
    # libtorch.so loads libtorch_cuda.so. Without "--no-as-needed" the linker would drop it.
    command += [f"-L{tools.torch.lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    command += ["-Wl,--as-needed"]
    if cuda:
        command += [f"-L{folder}" for folder in tools.nvcc.library_folders()]
        command += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    command += ["-Wl,--exclude-libs,ALL"]
    stamp = tools.cxx_version + tools.torch.version
    return Step(output, command, f"link {output.name}", stamp, inputs=objects)


def _git(*arguments: str) -> str | None:
    """Output of git in this checkout, or None without git or outside a checkout of this project."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def csrc_hash() -> str:
    """SHA-256 over the contents of the tracked files of csrc/, in the byte order of their names.

    A source archive has no git; there, all files of csrc/ count.
    """
    listed = _git("ls-files", "-z", "csrc")
    if listed is not None:
        names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    else:
        names = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    digest = hashlib.sha256()
    for name in sorted(names, key=os.fsencode):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _build_info(tools: Tools) -> dict:
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") or ""
    return {
        "torch": tools.torch.version,
        "torch_minimum": TORCH_MINIMUM,
        "machine": platform.machine(),
        "compiler": tools.cxx_version,
        "nvcc": tools.nvcc and tools.nvcc.version,
        "cuda_archs": tools.archs,
        "commit": commit and commit.strip() + ("-dirty" if changed.strip() else ""),
        "csrc_sha256": csrc_hash(),
    }


def compile_steps(kind: str, folder: Path, tools: Tools) -> list[Step]:
    return [_compile_step(source, folder, tools) for source in sources(kind)]


def build(folder: Path) -> dict[str, Path]:
    """Build what is out of date below `folder`. Returns {file name: path}.

    The result holds CUDA_LIBRARY only if a CUDA library was asked for.
    """
    tools = find_tools()
    kinds = {"cpu": CPU_LIBRARY} | ({"cuda": CUDA_LIBRARY} if tools.nvcc else {})
    with build_lock(folder):
        steps = {kind: compile_steps(kind, folder, tools) for kind in kinds}
        if any(not step.up_to_date() for step in steps.get("cuda", ())):
            print(
                f"[dualhead_ext] compiling CUDA kernels for {' '.join(tools.archs)} with nvcc "
                f"{tools.nvcc.version}, some minutes; DUALHEAD_CUDA=0 leaves them out, "
                "TORCH_CUDA_ARCH_LIST names fewer architectures",
                flush=True,
            )
        # CUDA sources first: they take longest.
        run_steps([step for kind in reversed(kinds) for step in steps[kind]])
        links = {
            name: _link_step(
                folder / name, [step.output for step in steps[kind]], tools, kind == "cuda"
            )
            for kind, name in kinds.items()
        }
        run_steps(list(links.values()))
        info = folder / BUILD_INFO
        info.write_text(json.dumps(_build_info(tools), indent=2) + "\n")
    return {**{name: link.output for name, link in links.items()}, BUILD_INFO: info}


def install(products: dict[str, Path], package: Path) -> None:
    """Copy the products into the package's folder and remove the libraries of an earlier build.

    Each file is replaced by a rename, so that a process which has mapped the old library keeps it.
    """
    package.mkdir(parents=True, exist_ok=True)
    for name in PRODUCTS:
        if name not in products:
            (package / name).unlink(missing_ok=True)
            continue
        staged = package / f".{name}.{os.getpid()}"
        shutil.copyfile(products[name], staged)
        os.replace(staged, package / name)
