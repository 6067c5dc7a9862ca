# SPDX-License-Identifier: Apache-2.0
"""The two libraries of the package: _C.so (schemas and CPU kernels, loads on every torch from 2.11
on) and _C_cuda.so (CUDA kernels, loads only on a CUDA torch, so it is a file of its own).
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
    """What a build uses. nvcc: None for no CUDA library."""

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
    """Relative to ROOT. A binding whose name ends in _cuda.cpp belongs to the CUDA library."""
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
        # Headers put their own path into error messages: not the build machine's.
        f"-fmacro-prefix-map={torch.include}=torch",
        "-isystem",
        str(torch.include),
        "-isystem",
        str(torch.include / "torch" / "csrc" / "api" / "include"),
    ]


def _from_root(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def _host_compiler(cxx: list[str]) -> str:
    """What of "ccache g++" nvcc can use."""
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
        if len(source.parts) == 2:  # csrc/*.cpp are the bindings; below are the kernels, torch-free
            command += _binding_flags(tools.torch)
            stamp += tools.torch.version
        if source.stem.endswith("_cuda"):
            command += ["-DUSE_CUDA"]  # declares the shim of the current CUDA stream
    command += ["-Icsrc", "-MMD", "-MF", _from_root(output) + ".d"]
    command += ["-c", str(source), "-o", _from_root(output)]
    return Step(output, command, f"compile {source}", stamp)


def _link_step(output: Path, objects: list[Path], tools: Tools, cuda: bool) -> Step:
    command = [*tools.cxx, "-shared", "-o", _from_root(output), *map(_from_root, objects)]
    # libtorch.so is needed by name although nothing of it is used: on a CUDA torch it is what
    # brings libtorch_cuda.so into scope, so one file serves both.
    command += [f"-L{tools.torch.lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    command += ["-Wl,--as-needed"]
    if cuda:
        command += [f"-L{folder}" for folder in tools.nvcc.library_folders()]
        command += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    command += ["-Wl,--exclude-libs,ALL"]
    stamp = tools.cxx_version + tools.torch.version
    return Step(output, command, f"link {output.name}", stamp, inputs=objects)


def _git(*arguments: str) -> str | None:
    """Output of git in this checkout; None where this is no checkout of its own, or has no git."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def csrc_hash() -> str:
    """SHA-256 over the contents of the files of csrc/ that git knows (all of them in a source
    archive), in the byte order of their names."""
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
    """Builds what is out of date below `folder`. Returns the path of each product by its name; no
    CUDA_LIBRARY where none was asked for."""
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
    """Puts the products into the package's folder and removes what an earlier build left there.

    Each file is replaced by a rename: a process that has the old library mapped keeps it.
    """
    package.mkdir(parents=True, exist_ok=True)
    for name in PRODUCTS:
        if name not in products:
            (package / name).unlink(missing_ok=True)
            continue
        staged = package / f".{name}.{os.getpid()}"
        shutil.copyfile(products[name], staged)
        os.replace(staged, package / name)
