# SPDX-License-Identifier: Apache-2.0
"""Builds what CMakeLists.txt describes into build/cmake: C++ tests and the module of bare kernels.

`make cpp-test` runs this file. Tests get the Python module from the fixture ``testing_module``.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cmake"


def _tool(name: str) -> str:
    """The path of a program, in this environment or else on PATH."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is not installed: pip install '.[test]' brings it")
    return path


def _run(*command: str, quiet: bool) -> None:
    said = subprocess.PIPE if quiet else None
    done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout or ''}")


def build(folder: Path = FOLDER, *options: str, quiet: bool = True) -> Path:
    """Configure, and compile what is out of date. Several processes may call this at once.

    quiet: show the compilers' messages only if they fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        python = [f"-DPython_EXECUTABLE={sys.executable}", "-DDUALHEAD_PYTHON=ON"]
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
        cmake = _tool("cmake")
        _run(cmake, "-S", str(ROOT), "-B", str(folder), *ninja, *python, *options, quiet=True)
        _run(cmake, "--build", str(folder), quiet=quiet)
    return folder


def testing_module(name: str = "dualhead_testing") -> ModuleType:
    """A pybind11 module of csrc/testing, from this build and no other: dualhead_testing, or
    dualhead_ordered, whose CUDA kernels report their memory accesses.
    """
    found = list(build().glob(f"{name}*.so"))
    if len(found) != 1:
        raise RuntimeError(f"one {name}*.so must be in {FOLDER}, found {len(found)}")
    spec = importlib.util.spec_from_file_location(name, found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    try:
        build(quiet=False)
    except RuntimeError as error:
        sys.exit(str(error))
