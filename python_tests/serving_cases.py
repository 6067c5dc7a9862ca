# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the two servers, vLLM's and that of transformers' continuous batching.

They are requests with every control, the answers of `generate()` to them, and a client.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dualhead_ext as dh
from dualhead_ext.data import embedded_backbone_path
from dualhead_ext.model.export import export

PATIENCE = 180  # seconds, for a server that takes about ten to start
NEW = 16


def with_something_to_say(model: Any, spread: float, seed: int = 1) -> Any:
    """A gated model whose untrained gate and reward head change its text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.lm_head_module.named_parameters():
            if "." in name:
                scale = spread if name.startswith("reward_head") else 0.05
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def gated(backbone: Any = None, **config: Any) -> Any:
    """The embedded backbone, or another one, with a gated head, in fp32."""
    if backbone is None:
        backbone = AutoModelForCausalLM.from_pretrained(
            embedded_backbone_path(), dtype=torch.float32
        )
        spread = {"full": 0.02, "embedding": 0.2, "lowrank": 0.2}
    else:
        spread = {"full": 0.3}
    config = {"reward_head": "full", "gate": "attention", "gate_head_dim": 48} | config
    model = dh.DualHeadForCausalLM.from_backbone(backbone, trial=False, **config)
    return with_something_to_say(model, spread[config["reward_head"]])


def served(model: Any, folder: Path, backbone: str | Path = "embedded") -> Path:
    model.save_pretrained(folder / "heads")
    return export(folder / "heads", folder / "served", backbone)


def prompts(vocab: int = 4096) -> list[list[int]]:
    """Prompts of 2 to 260 tokens. The last two share their first 96 tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab, (260,), generator=generator).tolist()
    return [ids[:2], ids[5:36], ids, [*ids[:96], 7, 9, 11]]


def controls(num_objectives: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {},
        {"strength": 0.0},
        {"strength": 2.0, "gate_offset": 0.5},
        {"gate_offset": -1.0},
        {"alpha": 1.0},
        {"max_kl": 0.05, "skip_threshold": 0.1},
    ]
    weights = [1.5] + [0.25] * (num_objectives - 1)
    return found if num_objectives == 1 else [*found, {"objective_weights": weights}]


def jobs(num_objectives: int, vocab: int = 4096) -> list[tuple[list[int], dict[str, Any]]]:
    """Every prompt with every control."""
    return [(ids, own) for ids in prompts(vocab) for own in controls(num_objectives)]


def expected(model: Any, work: list[tuple[list[int], dict[str, Any]]], new: int = NEW) -> list:
    """(tokens, the alpha of each) for every job, run alone."""
    found = []
    for ids, own in work:
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_gate=True,
            return_dict_in_generate=True,
            **own,
        )
        found.append((out.sequences[0, len(ids) :].tolist(), out.gate_alpha[0].float()))
    return found


def check(found: list, wanted: list, tolerance: float = 1e-4) -> None:
    """Check that all texts are equal and that every alpha is close."""
    assert len(found) == len(wanted)
    texts = {tuple(tokens) for tokens, _ in wanted}
    # Each prompt comes with six controls or more. Without an effect it would have one text.
    assert len(texts) > len(wanted) // 6
    for i, ((tokens, alpha), (own, own_alpha)) in enumerate(zip(found, wanted, strict=True)):
        assert tokens == own, f"job {i}"
        torch.testing.assert_close(alpha, own_alpha, rtol=0, atol=tolerance, msg=f"job {i}")


# --- over HTTP ------------------------------------------------------------------------------------


class Server:
    """`dualhead serve` in a process of its own, on any free port."""

    def __init__(self, heads: Path, log: Path, *options: str) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, "-m", "dualhead_ext", "serve", str(heads), "--name", "gated"]
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *options], stdout=file, stderr=file
            )

    def wait(self) -> Server:
        """Wait until it answers."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with self.open("/health"):
                    return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError(self.log.read_text()[-3000:])

    def open(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps({"model": "gated"} | body).encode()
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}{path}"
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=PATIENCE)

    def post(self, path: str, body: Any) -> Any:
        with self.open(path, body) as answer:
            return json.load(answer)

    def refusal(self, path: str, body: Any) -> tuple[int, str]:
        """(status, message) of an error."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(path, body)
        return caught.value.code, json.loads(caught.value.read())["error"]["message"]

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(ids: list[int], own: dict[str, Any]) -> dict[str, Any]:
    """The body of a job."""
    body = {"prompt": ids, "max_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
    return body | {"vllm_xargs": own | {"return_alpha": True}, "return_token_ids": True}


def answered(answer: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """(tokens, the alpha of each) of an answer to :func:`request`."""
    choice = answer["choices"][0]
    return choice["token_ids"], torch.tensor(choice["alpha"])


def events(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The events of a stream."""
    data = [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]
    assert data[-1] == b"[DONE]"
    return [json.loads(part) for part in data[:-1]]


# Wrong values of `vllm_xargs`, and what the answer says of each.
WRONG = (
    ({"strenght": 1.0}, "did you mean strength"),
    ({"strength": "much"}, "strength must be a number >= 0"),
    ({"alpha": 1.5}, "alpha must be a number in [0, 1]"),
    ({"objective_weights": [1.0, 2.0, 3.0]}, "objective_weights must be"),
    ({"return_alpha": "yes"}, "return_alpha must be true"),
)
