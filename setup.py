# SPDX-License-Identifier: Apache-2.0
"""Builds the two compiled libraries into the package. Everything else is in pyproject.toml.

Environment variables: DUALHEAD_CUDA=auto|nvcc|0|1 (auto: build the CUDA library if torch is a CUDA
build and nvcc is found; nvcc: build it for any torch if nvcc is found), TORCH_CUDA_ARCH_LIST
(default 8.0;9.0a;10.0+PTX for a CUDA torch, else 9.0a), CXX and MAX_JOBS. The build itself is in
_build/.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "_build"))
import libraries
from toolchain import BuildError

PACKAGE = "dualhead_ext"


class CleanBuild(build):
    """Build from an empty build/lib: setuptools keeps it, and would ship modules that are gone."""

    def run(self):
        if Path(self.build_lib).resolve().is_relative_to(libraries.ROOT / "build"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibraries(build_ext):
    """Build plain shared libraries, which torch loads by path.

    They contain no Python symbol, so that one file serves every version of Python.
    """

    def run(self):
        try:
            products = libraries.build(libraries.ROOT / "build" / "objects")
        except BuildError as error:
            raise CompileError(f"dualhead_ext cannot be built: {error}") from None
        self._names = list(products)
        if self.inplace:
            libraries.install(products, libraries.ROOT / PACKAGE)
        else:
            libraries.install(products, Path(self.build_lib, PACKAGE))

    def get_outputs(self):
        return [str(Path(self.build_lib, PACKAGE, name)) for name in self._names]

    def get_output_mapping(self):
        if not self.inplace:
            return {}
        return {
            str(Path(self.build_lib, PACKAGE, name)): str(Path(PACKAGE, name))
            for name in self._names
        }


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    # An extension marks the package as platform-specific. _build/libraries.py finds the sources.
    ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
)
