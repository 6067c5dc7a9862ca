# SPDX-License-Identifier: Apache-2.0
"""FSDP2 over two nodes: two network namespaces of this machine, with a virtual cable between them.

Each has its own addresses, ports and loopback, as machines have. They share the output folder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_cases import launched_with, run
from safetensors.torch import load_file
from trainer_cases import heads

from dualhead_ext.files.checkpoint import latest_checkpoint, verify

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "fsdp_nodes.py"
NODES, ADDRESSES = ("dualhead-0", "dualhead-1"), ("10.83.0.1", "10.83.0.2")
CABLE = "cable"  # what both nodes call their end


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def cable():
    """The two nodes, connected."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2)")
    try:
        ip("netns", "add", NODES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        ip("netns", "add", NODES[1])
        ends = [*("link", "add", CABLE, "netns", NODES[0]), "type", "veth"]
        ip(*ends, "peer", "name", CABLE, "netns", NODES[1])
        for node, address in zip(NODES, ADDRESSES, strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", node, "link", "set", CABLE, "up")
            ip("-n", node, "link", "set", "lo", "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True, timeout=60)


def train(folder, part):
    """The exit codes and outputs of torchrun on both nodes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29500"]
    env = os.environ | launched_with("fsdp2.yaml") | {"OMP_NUM_THREADS": "1"}
    env["GLOO_SOCKET_IFNAME"] = CABLE  # gloo would take the address of the machine's name
    agents = [
        subprocess.Popen(
            ["ip", "netns", "exec", node, *command, "--node-rank", str(rank), SCRIPT, folder, part],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, node in enumerate(NODES)
    ]  # fmt: skip
    try:
        said = [agent.communicate(timeout=900)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], said


def assert_heads_of_one_process(folder, part):
    found = load_file(folder / f"{part}.safetensors")
    expected = heads(run(folder / f"one-{part}", "rows", gradient_accumulation_steps=4).model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


def test_two_nodes_train_the_heads_of_one_process(cable, tmp_path):
    codes, said = train(tmp_path, "whole")
    assert codes == [0, 0], said
    assert_heads_of_one_process(tmp_path, "whole")


def test_a_killed_process_ends_the_other_node_and_the_run_can_resume(cable, tmp_path):
    codes, said = train(tmp_path, "lost")
    last = latest_checkpoint(tmp_path / "lost")
    assert last.name == "checkpoint-2" and verify(last)
    assert 0 not in codes, said
    assert (tmp_path / "said.txt").read_text() == (
        "DualHeadTrainer: another process of this run has ended or does not answer; "
        f"{last} is whole, and resume_from_checkpoint=True resumes from it"
    )
    codes, said = train(tmp_path, "resumed")
    assert codes == [0, 0], said
    assert_heads_of_one_process(tmp_path, "resumed")
