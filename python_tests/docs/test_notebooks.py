# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from first to last cell, in order, on the built-in model."""

from __future__ import annotations

import json
import re

import pytest
from build_backend import ROOT

FOLDER = ROOT / "examples" / "notebooks"
ORDER = ("train_and_steer", "inspect_alpha")  # the second notebook reads what the first one saves


def test_they_are_committed_without_outputs():
    found = sorted(FOLDER.glob("*.ipynb"))
    assert {path.stem for path in found} == set(ORDER)
    for path in found:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, path.name


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{name: the notebook with its outputs}, and the folder in which they ran."""
    client = pytest.importorskip("nbclient", reason="the extra test is not installed: nbclient")
    nbformat = pytest.importorskip("nbformat", reason="the extra test is not installed: nbformat")
    pytest.importorskip("ipykernel", reason="the extra test is not installed: ipykernel")
    folder = tmp_path_factory.mktemp("notebooks")
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALHEAD_NOTEBOOK_BACKBONE", "embedded")
        # Otherwise the kernel would read the settings of the user who runs the tests.
        patch.setenv("IPYTHONDIR", str(folder / ".ipython"))
        for name in ORDER:
            notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
            resources = {"metadata": {"path": str(folder)}}
            runner = client.NotebookClient(
                notebook, timeout=1800, startup_timeout=600, resources=resources
            )
            done[name] = runner.execute()
    return done, folder


def printed(notebook) -> str:
    return "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def shown(notebook, kind: str) -> list:
    """What the cells displayed, of one MIME type."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [o["data"][kind] for o in outputs if kind in o.get("data", {})]


@pytest.mark.slow
def test_train_and_steer(executed):
    done, folder = executed
    text = printed(done["train_and_steer"])
    assert re.search(r"^[\d,]+ parameters are trained$", text, re.MULTILINE)
    assert "pairs of held-out lists ranked right: " in text
    for strength in (0, 1, 2):
        assert f"strength {strength} (VADER " in text
    assert (folder / "my-heads" / "dualhead_config.json").is_file()


@pytest.mark.slow
def test_inspect_alpha(executed):
    done, folder = executed
    notebook = done["inspect_alpha"]
    (inspection,) = [html for html in shown(notebook, "text/html") if "strength 1" in html]
    assert " wonderful" in re.sub("<[^>]*>", "", inspection)
    assert "reward head" in printed(notebook)
    assert len(shown(notebook, "image/png")) == 1
    assert "strength 1.5" in (folder / "alpha.html").read_text()
