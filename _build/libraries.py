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
from pathlib import Path

from compile import ROOT, Step, build_lock, run_steps
from toolchain import (
    CXX_FLAGS,
    NVCC_FLAGS,
    TORCH_TARGET,
    BuildError,
    Nvcc,
    choose_cuda,
    cuda_archs,
    find_cxx,
    gencode_flags,
)
from torch_location import Torch, find_torch

CPU_LIBRARY = "_C.so"
CUDA_LIBRARY = "_C_cuda.so"
BUILD_INFO = "_build_info.json"
PRODUCTS = (CPU_LIBRARY, CUDA_LIBRARY, BUILD_INFO)


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
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        # Headers put their own path into error messages: not the build machine's.
        f"-fmacro-prefix-map={torch.include}=torch",
        "-isystem",
        str(torch.include),
        "-isystem",
        str(torch.include / "torch" / "csrc" / "api" / "include"),
    ]


def _compile_step(source: Path, objects: Path, cxx: list[str], nvcc: Nvcc | None, torch: Torch):
    output = objects / source.with_name(source.name + ".o")
    depfile = output.with_name(output.name + ".d")
    if source.suffix == ".cu":
        assert nvcc is not None
        command = [nvcc.program, *NVCC_FLAGS, *gencode_flags(cuda_archs()), "--threads=0"]
        command += ["-ccbin", cxx[0]] if os.environ.get("CXX") else []
        stamp = nvcc.version
    else:
        command = [*cxx, *CXX_FLAGS, f"-fmacro-prefix-map={ROOT}/="]
        stamp = torch.version
        if len(source.parts) == 2:  # csrc/*.cpp are the bindings; below are the kernels, torch-free
            command += _binding_flags(torch)
        if source.stem.endswith("_cuda"):
            command += ["-DUSE_CUDA"]  # declares the shim of the current CUDA stream
    command += ["-Icsrc", "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
    return Step(output, command, f"compile {source}", stamp)


def _link_step(
    output: Path, objects: list[Path], cxx: list[str], nvcc: Nvcc | None, torch: Torch
) -> Step:
    # libtorch.so is needed by name although nothing of it is used: on a CUDA torch it is what
    # brings libtorch_cuda.so into scope, so one file serves both.
    command = [*cxx, "-shared", "-o", str(output), *map(str, objects), f"-L{torch.lib}"]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
    if nvcc is not None:
        command += [f"-L{folder}" for folder in nvcc.library_folders()]
        command += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    command += ["-Wl,--exclude-libs,ALL"]
    return Step(output, command, f"link {output.name}", torch.version, inputs=objects)


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


def _build_info(cxx: list[str], nvcc: Nvcc | None, torch: Torch) -> dict:
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no") or ""
    first_line = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    return {
        "torch": torch.version,
        "torch_minimum": "2.11",
        "machine": platform.machine(),
        "compiler": first_line.partition("\n")[0],
        "nvcc": nvcc and nvcc.version,
        "cuda_archs": cuda_archs() if nvcc else [],
        "commit": commit and commit.strip() + ("-dirty" if changed.strip() else ""),
        "csrc_sha256": csrc_hash(),
    }


def build(folder: Path) -> dict[str, Path]:
    """Builds what is out of date below `folder`. Returns the path of each product by its name; no
    CUDA_LIBRARY where none was asked for."""
    torch = find_torch()
    if torch is None:
        raise BuildError(
            "torch >= 2.11 is not installed in this environment, and its headers are needed to "
            "compile: pip install 'torch>=2.11' first, or build without --no-build-isolation."
        )
    cxx = find_cxx()
    nvcc = choose_cuda() if sources("cuda") else None
    kinds = {"cpu": CPU_LIBRARY} | ({"cuda": CUDA_LIBRARY} if nvcc else {})
    with build_lock(folder):
        steps = {
            kind: [_compile_step(src, folder, cxx, nvcc, torch) for src in sources(kind)]
            for kind in kinds
        }
        run_steps([step for kind in kinds for step in steps[kind]])
        products = {}
        for kind, name in kinds.items():
            objects = [step.output for step in steps[kind]]
            link = _link_step(folder / name, objects, cxx, nvcc if kind == "cuda" else None, torch)
            run_steps([link])
            products[name] = link.output
        info = folder / BUILD_INFO
        info.write_text(json.dumps(_build_info(cxx, nvcc, torch), indent=2) + "\n")
        products[BUILD_INFO] = info
    return products


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
