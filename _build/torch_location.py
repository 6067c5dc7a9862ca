# SPDX-License-Identifier: Apache-2.0
"""Find torch's headers and libraries without importing torch.

The import takes two seconds, and is impossible in pip's isolated build environment.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# The libraries are built for the stable ABI of this torch, and run on it and on every later one.
MINIMUM = (2, 11)


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str  # as in torch.__version__
    cuda: str | None  # as in torch.version.cuda

    @property
    def include(self) -> Path:
        return self.root / "include"

    @property
    def lib(self) -> Path:
        return self.root / "lib"


def _target_folders() -> list[str]:
    """The site-packages folders of the environment that the package is installed into, best first.

    Under pip's isolation ``sys.path`` holds the build environment only, but the interpreter is that
    of the target environment.
    """
    paths = [sysconfig.get_paths()[key] for key in ("purelib", "platlib")]
    configuration = Path(sys.prefix, "pyvenv.cfg")
    inside = sys.prefix != sys.base_prefix and configuration.is_file()
    shared = inside and re.search(
        r"(?im)^include-system-site-packages\s*=\s*true", configuration.read_text()
    )
    if shared:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths += [sysconfig.get_path(key, vars=base) for key in ("purelib", "platlib")]
    if (shared or not inside) and not os.environ.get("PYTHONNOUSERSITE"):
        paths.append(site.getusersitepackages())
    return paths


def _torch_in(folder: str) -> Torch | None:
    version_file = Path(folder, "torch", "version.py")
    if not version_file.is_file():
        return None
    text = version_file.read_text()
    version = re.search(r"(?m)^__version__\s*=\s*['\"](\d+)\.(\d+)([^'\"]*)", text)
    if version is None or (int(version[1]), int(version[2])) < MINIMUM:
        return None
    cuda = re.search(r"(?m)^cuda[^=\n]*=\s*['\"]([^'\"]+)['\"]", text)
    return Torch(version_file.parent, f"{version[1]}.{version[2]}{version[3]}", cuda and cuda[1])


def find_installed_torch() -> Torch | None:
    """The torch of the environment that the package is installed into, if it is new enough."""
    found = (_torch_in(folder) for folder in _target_folders())
    return next((torch for torch in found if torch), None)


def find_torch() -> Torch | None:
    """The torch to compile against: the target environment's, else the build environment's."""
    found = (_torch_in(folder) for folder in [*_target_folders(), *sys.path])
    return next((torch for torch in found if torch), None)
