# SPDX-License-Identifier: Apache-2.0
"""Heads on a model hub: one program pushes them and another loads them, with huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hub_server import serving

PUSH = """
import torch
import dualhead_ext as dh

model = dh.DualHeadForCausalLM.from_backbone(dh.backbone_path("embedded"), trial=False)
torch.manual_seed(0)
torch.nn.init.normal_(model.lm_head_module.reward_head.bias, std=0.3)
model.push_to_hub("me/heads", commit_message="first heads")
model.save_pretrained("here", push_to_hub=True, repo_id="me/others", token="mine")
print(model(torch.arange(5)[None]).logits.sum().item().hex())
"""
LOAD = """
import torch
import dualhead_ext
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("me/heads")
AutoTokenizer.from_pretrained("me/heads")
print(model(torch.arange(5)[None]).logits.sum().item().hex())
"""


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


def run(code, hub, folder):
    """Run a program with that hub, and with its own cache and settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "a-token"}
    environment["HF_HUB_DISABLE_XET"] = "1"  # uploads use Git LFS, which this hub supports
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.slow
def test_pushed_heads_are_loaded_with_one_line(hub, tmp_path):
    for name in ("author", "reader"):
        (tmp_path / name).mkdir()
    logits = run(PUSH, hub, tmp_path / "author")
    assert run(LOAD, hub, tmp_path / "reader") == logits
    assert not [asked for asked in hub.unknown if "me/" in asked]
    # The repository holds exactly the files of a folder of heads.
    files = ["README.md", "config.json", "dualhead_config.json", "dualhead_model.safetensors"]
    assert hub.names("me/heads") == hub.names("me/others") == files
    assert hub.messages[0] == "first heads"
    assert hub.tokens >= {"Bearer a-token", "Bearer mine"}
    for path in files:
        here = (tmp_path / "author" / "here" / path).read_bytes()
        assert hub.files["me/others", path] == here
    assert json.loads(hub.files["me/heads", "config.json"])["model_type"] == "dualhead"
    everything = b"".join(hub.files.values())
    assert str(tmp_path).encode() not in everything
