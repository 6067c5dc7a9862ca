# SPDX-License-Identifier: Apache-2.0
"""What `make wheel` accepts, and that the version is written in one place.

The build itself needs a fresh environment, and is tested by `make wheel`.
"""

from __future__ import annotations

import importlib
import json
import re
import zipfile
from pathlib import Path

import pytest
from build_backend import ROOT, libraries

import dualhead_ext
from dualhead_ext.cli import main
from tools.wheel import build

GOOD = "dualhead_ext-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
FILES = ("dualhead_ext/__init__.py", "dualhead_ext/_C.so", "dualhead_ext-0.1.0.dist-info/WHEEL")


def wheel(folder: Path, name: str, *files: str) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    return folder / name


def test_a_portable_wheel_passes(tmp_path):
    build.check(wheel(tmp_path, GOOD, *FILES))
    build.check(wheel(tmp_path, GOOD.replace("0.1.0", "1.0rc1"), *FILES))


@pytest.mark.parametrize(
    "name",
    [
        "dualhead_ext-0.1.0-py3-none-linux_x86_64.whl",
        "dualhead_ext-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "dualhead_ext-0.1.0-py3-none-any.whl",
        "other-0.1.0-py3-none-manylinux_2_28_x86_64.whl",
    ],
)
def test_a_wheel_for_one_python_or_one_system_does_not(tmp_path, name):
    with pytest.raises(ValueError, match=rf"expected dualhead_ext-\*.* got {re.escape(name)}"):
        build.check(wheel(tmp_path, name, *FILES))


@pytest.mark.parametrize(
    "file",
    ["dualhead_ext/_C_cuda.so", "dualhead_ext.libs/libtorch_cpu-1.so", "dualhead_ext.libs/x.so.6"],
)
def test_no_other_library_is_inside(tmp_path, file):
    with pytest.raises(ValueError, match=rf"_C\.so alone, got .*{re.escape(file)}"):
        build.check(wheel(tmp_path, GOOD, *FILES, file))
    with pytest.raises(ValueError, match=r"_C\.so alone"):
        build.check(wheel(tmp_path, GOOD, *FILES[:1]))


def test_no_sources_are_inside(tmp_path):
    with pytest.raises(ValueError, match=r"got dualhead_ext/ops\.cpp"):
        build.check(wheel(tmp_path, GOOD, *FILES, "dualhead_ext/ops.cpp"))


def test_torch_is_left_out_by_the_names_that_are_linked():
    """Otherwise auditwheel would copy these libraries into the wheel."""
    step = libraries._link_step(ROOT / "x.so", [], libraries.find_tools(), cuda=False)
    linked = {f"lib{word[2:]}.so" for word in step.command if word.startswith("-l")}
    assert linked == set(build.TORCH_LIBRARIES)


def test_the_smoke_test_refuses_a_source_tree(monkeypatch, tmp_path):
    """If it imported the checkout, it would pass whatever the wheel contains."""
    smoke = importlib.import_module("tools.wheel.smoke")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    with pytest.raises(SystemExit, match="imported from"):
        smoke.installed()


def test_one_version(capsys):
    """All take it from dualhead_ext.__version__, which pyproject.toml reads."""
    version = dualhead_ext.__version__
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert 'version = { attr = "dualhead_ext.__version__" }' in pyproject
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == version
    assert dualhead_ext.build_info()["version"] == version


def test_the_release_tries_the_oldest_and_the_tested_torch():
    release = (ROOT / ".github/workflows/release.yml").read_text()
    tested = re.search(r"(?m)^torch==(.*)$", (ROOT / "constraints.txt").read_text())[1]
    assert f'torch: ["{libraries.TORCH_MINIMUM}.0", "{tested}"]' in release
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'python: ["{oldest}", ' in release
