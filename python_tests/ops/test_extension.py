# SPDX-License-Identifier: Apache-2.0
"""The compiled libraries: their contents, what they need, and what they report.

A library that is missing or does not load gives one sentence, not a crash.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_backend import ROOT, libraries, toolchain, torch_location

import dualhead_ext
from dualhead_ext.ops import library as _extension

PACKAGE = Path(dualhead_ext.__file__).parent


# --- what was built -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> list[Path]:
    found = [PACKAGE / name for name in (libraries.CPU_LIBRARY, libraries.CUDA_LIBRARY)]
    assert found[0].is_file(), "run make build"
    return [path for path in found if path.is_file()]


def dynamic_symbols(library: Path, which: str) -> list[str]:
    command = ["nm", "-D", f"--{which}", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in text.splitlines()]


def test_only_the_stable_abi_is_used(built):
    """A C++ symbol of torch would tie the library to one torch version."""
    for library in built:
        undefined = dynamic_symbols(library, "undefined-only")
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
        # In the Itanium mangling, 3c10, 2at, 5torch and 6caffe2 are torch's namespaces.
        unstable = [n for n in undefined if re.match(r"_Z[A-Z]*(3c10|2at|5torch|6caffe2)", n)]
        assert not unstable
        assert not [name for name in undefined if name.startswith(("Py", "_Py"))]


def test_nothing_of_ours_is_exported(built):
    """Exported symbols could clash with those of a second version or another library's cudart."""
    for library in built:
        exported = dynamic_symbols(library, "defined-only")
        assert not [n for n in exported if "dualhead" in n or n.startswith(("cuda", "__cuda"))]


def test_no_path_of_the_build_machine_is_in_the_libraries(built):
    include = str(torch_location.find_torch().include)
    for library in built:
        content = library.read_bytes()
        assert str(ROOT).encode() not in content
        assert include.encode() not in content


def test_the_library_is_of_these_sources():
    """If this fails, the library is out of date: run make build."""
    listed = libraries._git("ls-files", "csrc")
    if listed is None:
        pytest.skip("this is not a git checkout")
    names = sorted(listed.split(), key=os.fsencode)
    content = b"".join((ROOT / name).read_bytes() for name in names)
    assert len(content) > 10_000
    expected = hashlib.sha256(content).hexdigest()
    assert libraries.csrc_hash() == expected
    assert dualhead_ext.build_info()["csrc_sha256"] == expected


def test_the_hash_needs_no_git(monkeypatch, tmp_path):
    (tmp_path / "csrc" / "kernels").mkdir(parents=True)
    (tmp_path / "csrc" / "kernels" / "a.h").write_text("A")
    (tmp_path / "csrc" / "z.h").write_text("Z")
    (tmp_path / "csrc" / "B.h").write_text("B")
    monkeypatch.setattr(libraries, "ROOT", tmp_path)
    assert libraries.csrc_hash() == hashlib.sha256(b"BAZ").hexdigest()


def test_build_info_says_what_runs():
    info = dualhead_ext.build_info()
    assert info["version"] == dualhead_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["torch_minimum"] == "2.11"
    assert info["cpu_problem"] is None
    assert info["cpu_isa"] in info["cpu_isa_levels"]
    assert info["cpu_isa_levels"][-1] == "portable"
    if libraries._git("rev-parse", "HEAD") is None:
        assert info["commit"] is None
    else:
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", info["commit"])
    has_cuda = (PACKAGE / libraries.CUDA_LIBRARY).is_file()
    assert bool(info["cuda_archs"]) == has_cuda == bool(info["nvcc"])


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_the_isa_can_be_forced(isa):
    if isa not in dualhead_ext.build_info()["cpu_isa_levels"]:
        pytest.skip(f"this machine does not run {isa}")
    assert forced_isa(isa).stdout.strip() == isa


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_an_isa_that_the_machine_lacks_fails(isa):
    levels = dualhead_ext.build_info()["cpu_isa_levels"]
    if isa in levels or platform.machine() != "x86_64":
        pytest.skip(f"this machine runs {isa}, or is of another kind")
    done = forced_isa(isa)
    assert done.returncode != 0
    assert f"this machine cannot run '{isa}'; it runs {','.join(levels)}" in done.stderr


def test_an_unknown_isa_fails():
    done = forced_isa("mmx")
    assert done.returncode != 0
    assert "DUALHEAD_FORCE_ISA must be one of" in done.stderr


def forced_isa(name: str) -> subprocess.CompletedProcess:
    code = "import dualhead_ext; print(dualhead_ext.build_info()['cpu_isa'])"
    environment = {**os.environ, "DUALHEAD_FORCE_ISA": name}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """The loader, which looks for libraries in an empty folder."""
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(_extension, "_problems", {"cpu": None, "cuda": None})
    return tmp_path


def test_a_missing_library_is_one_sentence(other_package):
    assert re.match(r"the compiled library _C\.so is missing; rebuild it", _extension._load("cpu"))


def test_a_library_that_does_not_load_names_both_versions(other_package, monkeypatch):
    shutil.copy(PACKAGE / libraries.BUILD_INFO, other_package)
    source = other_package / "needs.cpp"
    source.write_text("void newer_torch(); struct S { S() { newer_torch(); } } s;\n")
    output = str(other_package / libraries.CPU_LIBRARY)
    command = [*toolchain.find_cxx(), "-shared", "-fPIC", str(source), "-o", output]
    subprocess.run([*command, "-Wl,-z,now"], check=True)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    sentence = _extension._load("cpu")
    built = dualhead_ext.build_info()["torch_built"]
    assert f"built for torch >= 2.11 (headers of {built})" in sentence
    assert "does not load in this torch 2.10.0" in sentence
    assert "newer_torch" in sentence
    assert "\n" not in sentence


def test_a_damaged_library_is_no_crash(other_package):
    (other_package / libraries.CPU_LIBRARY).write_bytes(b"\x7fELF damaged")
    assert "of unknown origin, does not load" in _extension._load("cpu")


def test_cuda_library_rules(other_package, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    (other_package / libraries.CUDA_LIBRARY).write_bytes(b"would crash")
    assert "need a CUDA build of torch" in _extension._load("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "_C_cuda.so" in _extension._load("cuda")
    _extension._problems["cpu"] = "no schemas"
    assert _extension._load("cuda") == "no schemas"
    _extension._problems["cpu"] = None
    (other_package / libraries.CUDA_LIBRARY).unlink()
    assert "the CUDA kernels were not built" in _extension._load("cuda")


def test_require_raises_the_sentence(monkeypatch):
    _extension.require("cpu")
    monkeypatch.setitem(_extension._problems, "cpu", "the library is missing")
    with pytest.raises(RuntimeError, match=r"^dualhead_ext: the library is missing$"):
        _extension.require("cpu")
