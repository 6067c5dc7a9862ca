# SPDX-License-Identifier: Apache-2.0
"""The build: what it finds, what it recompiles, the contents of the wheel, and its errors.

test_extension.py tests the libraries that it makes, and how they are loaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from build_backend import ROOT, backend, incremental, libraries, toolchain, torch_location

# --- which torch ----------------------------------------------------------------------------------


def fake_torch(folder: Path, version: str, cuda: str = "None") -> Path:
    (folder / "torch").mkdir(parents=True)
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\n"
    (folder / "torch" / "version.py").write_text(text)
    return folder


@pytest.fixture
def only_folders(monkeypatch):
    """Make the given folders the target environment, and hide torch from sys.path."""

    def set_folders(*folders: Path) -> None:
        monkeypatch.setattr(torch_location, "_target_folders", lambda: list(map(str, folders)))
        monkeypatch.setattr(sys, "path", [])

    monkeypatch.delenv("DUALHEAD_BUILD_TORCH", raising=False)
    return set_folders


def test_the_running_torch_is_found():
    found = torch_location.find_installed_torch()
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert (found.include / "torch" / "csrc" / "stable" / "library.h").is_file()
    assert (found.lib / "libtorch.so").is_file()


def test_versions_are_read(tmp_path, only_folders):
    only_folders(fake_torch(tmp_path, "2.14.1+cu130", "'13.0'"))
    found = torch_location.find_installed_torch()
    assert (found.version, found.cuda) == ("2.14.1+cu130", "13.0")


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0"])
def test_too_old_a_torch_is_none(tmp_path, only_folders, version):
    only_folders(fake_torch(tmp_path, version))
    assert torch_location.find_installed_torch() is None
    assert backend._torch_requirement() == ["torch>=2.11"]


def test_torch_is_asked_for_only_where_it_is_missing(tmp_path, only_folders, monkeypatch):
    only_folders(tmp_path)
    assert backend._torch_requirement() == ["torch>=2.11"]
    monkeypatch.setenv("DUALHEAD_BUILD_TORCH", "torch==2.13.0")
    assert backend._torch_requirement() == ["torch==2.13.0"]
    only_folders(fake_torch(tmp_path / "site", "2.11.0"))
    assert backend._torch_requirement() == []


def test_the_target_environment_goes_before_the_build_environment(
    tmp_path, only_folders, monkeypatch
):
    target, isolated = tmp_path / "target", tmp_path / "isolated"
    only_folders(target)
    monkeypatch.setattr(sys, "path", [str(fake_torch(isolated, "2.15.0"))])
    assert torch_location.find_torch().version == "2.15.0"
    fake_torch(target, "2.12.0")
    assert torch_location.find_torch().version == "2.12.0"


def test_shared_site_packages_are_the_target_too(tmp_path, monkeypatch):
    """A venv made with --system-site-packages uses the system's torch."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    configuration = tmp_path / "pyvenv.cfg"
    configuration.write_text("include-system-site-packages = true\n")
    shared = torch_location._target_folders()
    configuration.write_text("include-system-site-packages = false\n")
    own = torch_location._target_folders()
    assert len(shared) > len(own)
    assert any(folder.startswith(sys.base_prefix) for folder in shared)


def test_one_minimum_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'dependencies = ["torch>={libraries.TORCH_MINIMUM}"]' in text


# --- which compilers ------------------------------------------------------------------------------


@pytest.fixture
def no_tools(tmp_path, monkeypatch):
    """An environment without compilers. Returns the folder that is its PATH."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "DUALHEAD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_ROOT", str(tmp_path / "no-cuda"))
    return tmp_path


def fake_program(path: Path, output: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def test_no_compiler_is_one_sentence(no_tools, monkeypatch):
    with pytest.raises(toolchain.BuildError, match=r"no C\+\+ compiler found: install g\+\+"):
        toolchain.find_cxx()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(toolchain.BuildError, match=r"CXX names .*'no-such-compiler'"):
        toolchain.find_cxx()


def test_cxx_may_be_several_words(no_tools, monkeypatch):
    fake_program(no_tools / "ccache", "")
    monkeypatch.setenv("CXX", "ccache g++")
    assert toolchain.find_cxx() == ["ccache", "g++"]
    assert libraries._host_compiler(["ccache", "g++"]) == "g++"


def test_cuda_switch(no_tools, monkeypatch):
    assert toolchain.choose_cuda("12.8") is None
    monkeypatch.setenv("DUALHEAD_CUDA", "1")
    with pytest.raises(toolchain.BuildError, match=r"DUALHEAD_CUDA=1 .* no nvcc was found"):
        toolchain.choose_cuda(None)
    nvcc = fake_program(no_tools / "toolkit" / "bin" / "nvcc", "Cuda tools, release 12.8, V12.8.93")
    monkeypatch.setenv("CUDA_HOME", str(no_tools / "toolkit"))
    found = toolchain.Nvcc(str(nvcc), "12.8")
    # {(DUALHEAD_CUDA, CUDA version of torch): whether the CUDA library is built}
    cases = {("1", None): True, ("1", "12.8"): True, ("0", None): False, ("0", "12.8"): False}
    cases |= {("auto", None): False, ("auto", "13.0"): True, ("nvcc", None): True}
    for (switch, torch_cuda), built in cases.items():
        monkeypatch.setenv("DUALHEAD_CUDA", switch)
        assert toolchain.choose_cuda(torch_cuda) == (found if built else None), (switch, torch_cuda)
    monkeypatch.delenv("DUALHEAD_CUDA")
    assert toolchain.choose_cuda(None) is None  # pip install . beside a CPU-only torch
    monkeypatch.setenv("DUALHEAD_CUDA", "yes")
    with pytest.raises(toolchain.BuildError, match="must be auto, nvcc, 0 or 1, got 'yes'"):
        toolchain.choose_cuda(None)


def test_archs_are_those_of_the_environment(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.cuda_archs("13.0") == ["8.0", "9.0a", "10.0+PTX"]
    assert toolchain.cuda_archs(None) == ["9.0a"]
    for text in ("8.6;9.0a+PTX", "8.6 9.0a+PTX", " 8.6, 9.0a+PTX "):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        for torch_cuda in (None, "13.0"):
            assert toolchain.cuda_archs(torch_cuda) == ["8.6", "9.0a+PTX"]
    assert toolchain.gencode_flags(["8.6", "9.0a+PTX"]) == [
        "-gencode=arch=compute_86,code=[sm_86]",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(toolchain.BuildError, match="got 'Hopper'"):
        toolchain.cuda_archs("13.0")


# --- what is recompiled ---------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A source file that includes a header, and the step that compiles it."""
    (tmp_path / "part.h").write_text("inline int part() { return 1; }\n")
    (tmp_path / "a b.cpp").write_text('#include "part.h"\nint whole() { return part(); }\n')
    output = tmp_path / "out" / "a b.o"

    def step(*flags: str, stamp: str = "") -> incremental.Step:
        command = [*toolchain.find_cxx(), *flags, "-MMD", "-MF", f"{output}.d"]
        command += ["-c", str(tmp_path / "a b.cpp"), "-o", str(output)]
        return incremental.Step(output, command, "compile a b.cpp", stamp)

    return tmp_path, step


def touch_later(path: Path, text: str) -> None:
    path.write_text(text)
    later = time.time() + 10  # file times may be coarse, so the difference must be large
    os.utime(path, (later, later))


def test_only_what_changed_is_recompiled(project):
    folder, step = project
    assert not step().up_to_date()
    incremental.run_steps([step()])
    assert step().up_to_date()
    assert not step("-O2").up_to_date(), "another flag"
    assert not step(stamp="other compiler").up_to_date()
    touch_later(folder / "part.h", "inline int part() { return 2; }\n")
    assert not step().up_to_date(), "an included header"
    incremental.run_steps([step()])
    (folder / "part.h").unlink()
    assert not step().up_to_date(), "a header that is gone"


def test_a_failed_step_is_not_up_to_date(project, capfd):
    folder, step = project
    incremental.run_steps([step()])
    source = (folder / "a b.cpp").read_text()
    touch_later(folder / "a b.cpp", "unknown whole();\n")
    with pytest.raises(toolchain.BuildError, match=r"could not compile a b\.cpp"):
        incremental.run_steps([step()])
    assert "does not name a type" in capfd.readouterr().err
    (folder / "a b.cpp").write_text(source)
    os.utime(folder / "a b.cpp", (1, 1))  # older than the object of the first run
    assert not step().up_to_date()


def test_kernels_are_not_compiled_with_torch():
    """The compiler cannot find torch's headers: no include path leads to them."""
    tools = libraries.find_tools()
    steps = libraries.compile_steps("cpu", ROOT / "build" / "objects", tools)
    kernels = [step for step in steps if "kernels" in step.title]
    bindings = [step for step in steps if "kernels" not in step.title]
    assert kernels and bindings
    assert not any(str(tools.torch.include) in word for step in kernels for word in step.command)
    for step in bindings:
        assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in step.command
        assert "-DTORCH_STABLE_ONLY" in step.command


def test_bindings_use_no_macro_of_a_newer_torch():
    """Torch 2.11 lacks these macros. Newer headers define them for every TORCH_TARGET_VERSION, so
    the compiler finds them there. `make test-oldest` compiles with 2.11."""
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b")  # 2.13; the same as without STABLE_
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources and not [path for path in sources if newer.search(path.read_text())]


def test_a_dropped_library_leaves_the_package(tmp_path):
    """A build with DUALHEAD_CUDA=0 removes the _C_cuda.so of an earlier build with CUDA."""
    names = (libraries.CPU_LIBRARY, libraries.CUDA_LIBRARY, libraries.BUILD_INFO)
    products = {name: tmp_path / name for name in names}
    for path in products.values():
        path.write_text("first")
    package = tmp_path / "package"
    libraries.install(products, package)
    assert sorted(os.listdir(package)) == sorted(names)
    held = (package / libraries.CPU_LIBRARY).open()
    products[libraries.CPU_LIBRARY].write_text("second")
    del products[libraries.CUDA_LIBRARY]
    libraries.install(products, package)
    assert sorted(os.listdir(package)) == sorted(products)
    assert (package / libraries.CPU_LIBRARY).read_text() == "second"
    assert held.read() == "first", "a running process must keep the file it has mapped"
    held.close()


# --- complete builds ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources with the objects compiled so far, to build without CUDA."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("_build", "csrc", "dualhead_ext", "python_tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "build" / "objects", folder / "build" / "objects")
    return folder


def run_setup(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DUALHEAD_CUDA": "0", **variables}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def test_a_moved_checkout_is_up_to_date(checkout):
    done = run_setup(checkout, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert "compile" not in done.stdout
    assert (checkout / "dualhead_ext" / libraries.CPU_LIBRARY).is_file()


def test_the_wheel(checkout):
    """Its tag, its files, and that it loads. The checkout has a stale CUDA library and module."""
    (checkout / "dualhead_ext" / libraries.CUDA_LIBRARY).write_text("stale")
    first = run_setup(checkout, "build")
    assert first.returncode == 0, first.stderr
    (build_lib,) = (checkout / "build").glob("lib.linux-*")
    for name in (libraries.CUDA_LIBRARY, "old.py"):
        (build_lib / "dualhead_ext" / name).write_text("stale")
    done = run_setup(checkout, "bdist_wheel", "--dist-dir", "wheels")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "wheels").glob("*.whl")
    assert re.fullmatch(r"dualhead_ext-.*-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(checkout / "installed")
    inside = {name.partition("/")[2] for name in names if name.startswith("dualhead_ext/")}
    assert {
        libraries.CPU_LIBRARY,
        libraries.BUILD_INFO,
        "__init__.py",
        "config.py",
        "py.typed",
    } <= inside
    assert not {libraries.CUDA_LIBRARY, "old.py"} & inside
    outside = {name.partition("/")[0] for name in names} - {"dualhead_ext"}
    assert all(name.endswith(".dist-info") for name in outside), outside
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".o"))]
    code = "import dualhead_ext as d; i = d.build_info(); print(i['cpu_isa'], i['cuda_archs'])"
    path = {**os.environ, "PYTHONPATH": str(checkout / "installed")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=path, cwd=checkout / "wheels", capture_output=True, text=True
    )
    assert re.fullmatch(r"\w+ \[\]", done.stdout.strip()), done.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"CXX": "no-such-g++"}, "CXX names the C++ compiler 'no-such-g++', which is not found."),
        ({"DUALHEAD_CUDA": "maybe"}, "DUALHEAD_CUDA must be auto, nvcc, 0 or 1, got 'maybe'."),
    ],
)
def test_a_build_that_cannot_be_is_one_sentence(checkout, variables, sentence):
    done = run_setup(checkout, "build_ext", "--inplace", **variables)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1] == f"error: dualhead_ext cannot be built: {sentence}"
    )


def test_the_source_archive_can_be_built_from(checkout):
    done = run_setup(checkout, "sdist", "--dist-dir", "archive", "--formats=zip")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "archive").glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        names = {name.partition("/")[2] for name in packed.namelist()}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    assert sources <= names
    assert {"_build/backend.py", "_build/libraries.py", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith(".so")]
