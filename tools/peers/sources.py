# SPDX-License-Identifier: Apache-2.0
"""The source archives of the tested libraries, in the installed versions, below build/peers/."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers"
# Versions of the libraries that need not be installed.
VERSIONS = {"cut-cross-entropy": "25.1.1", "liger-kernel": "0.8.5", "lm-eval": "0.4.13"}


def version_of(name: str) -> str:
    return VERSIONS.get(name) or importlib.metadata.version(name)


def source_of(name: str) -> Path:
    """The unpacked source archive of a package; downloaded once.

    Raises:
        RuntimeError: pip cannot download it; with pip's message.
    """
    stem = f"{name.replace('-', '_')}-{version_of(name)}"
    folder = FOLDER / stem
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = FOLDER / f"{stem}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(FOLDER)]
        done = subprocess.run(
            [*command, f"{name}=={version_of(name)}"], capture_output=True, text=True
        )
        if not archive.is_file():
            raise RuntimeError(f"{name}: its source archive cannot be had ({done.stderr[-300:]})")
    with tarfile.open(archive) as file:
        file.extractall(FOLDER, filter="data")
    return folder


def installed(name: str, needs: tuple[str, ...]) -> Path:
    """A folder with a package and its dependencies, separate from the project's environment.

    Raises:
        RuntimeError: pip cannot install them; with pip's message.
    """
    folder = FOLDER / name
    if not (folder / ".installed").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--target", str(folder), f"{name}=={VERSIONS[name]}", *needs]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} cannot be installed ({done.stderr[-300:]})")
        (folder / ".installed").touch()
    return folder


def upstream(name: str, module: str, absent: dict[str, str]) -> types.ModuleType:
    """``module`` (``tests.test_x``) of a package's source archive.

    Args:
        absent: module that the archive lacks -> class that is imported from it; an empty class is
            used instead.
    """
    tests = source_of(name) / "tests"
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(tests)]
    for missing, wanted in absent.items():
        parts = missing.split(".")
        for end in range(1, len(parts) + 1):
            short = ".".join(parts[:end])
            if short not in sys.modules:
                sys.modules[short] = types.ModuleType(short)
                sys.modules[short].__path__ = []
        setattr(sys.modules[missing], wanted, type(wanted, (), {}))
    return importlib.import_module(module)
