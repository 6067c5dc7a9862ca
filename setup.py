# SPDX-License-Identifier: Apache-2.0
"""Builds the two compiled libraries into the package; everything else is in pyproject.toml.

DUALHEAD_CUDA=auto|nvcc|0|1 (auto: for a CUDA torch, when nvcc is found; nvcc: for any torch),
TORCH_CUDA_ARCH_LIST (default 8.0;9.0a;10.0+PTX for a CUDA torch, 9.0a otherwise), CXX and MAX_JOBS
are honoured. How: _build/.
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
    """setuptools keeps build/lib: a module or a library that no longer exists would be shipped."""

    def run(self):
        if Path(self.build_lib).resolve().is_relative_to(libraries.ROOT / "build"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibraries(build_ext):
    """Plain shared libraries that torch loads by path: they hold no Python symbol, so one file
    serves every Python."""

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
    # Marks the package as platform-specific; the sources are found by _build/libraries.py.
    ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
)
