# SPDX-License-Identifier: Apache-2.0
"""Test of an installed wheel: it loads its library, decodes like the reference, trains a step and
reports its version. With --command-line it also trains and generates, which needs the extra
"train". Run by `environment`; imports installed packages only.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

import dualhead_ext
from dualhead_ext import functional, reference
from dualhead_ext.loss import reference as loss_reference
from dualhead_ext.loss.pairs import Pairing
from dualhead_ext.loss.terms import LossOptions

D, V, B, T = 48, 301, 3, 9


def expect(truth: bool, sentence: str) -> None:
    if not truth:
        sys.exit(f"smoke: {sentence}")


def installed() -> str:
    """Check that the installed package is complete and reports one version; returns the version."""
    place = Path(dualhead_ext.__file__)
    expect(place.is_relative_to(sys.prefix), f"imported from {place}, not from {sys.prefix}")
    version = importlib.metadata.version("dualhead_ext")
    info = dualhead_ext.build_info()
    expect(dualhead_ext.__version__ == version, f"{dualhead_ext.__version__} is not {version}")
    expect(info["version"] == version, f"build_info says {info['version']}, not {version}")
    expect(info["cpu_problem"] is None, f"the kernels do not load: {info['cpu_problem']}")
    expect(info["cuda_archs"] == [], f"built for CUDA: {info['cuda_archs']}")
    for name in ("backbone/model.safetensors", "samples/open-prompts.json"):
        expect((place.parent / "data" / name).is_file(), f"data/{name} is missing")
    return version


def decodes() -> None:
    """Check the compiled decode steps against a full pass in plain PyTorch."""
    sizes = {"hidden_size": D, "vocab_size": V, "gate_num_heads": 3, "gate_head_dim": 16}
    config = dualhead_ext.DualHeadConfig(**sizes, gate="attention")
    head = dualhead_ext.DualHead(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    hidden = torch.randn(B, T, D)
    gate = head.gate
    logit = reference.attention_gate_logit(
        hidden,
        *(getattr(gate, f"{name}_weight") for name in "qkvo"),
        gate.out_weight,
        gate.out_bias,
        gate.num_heads,
        None,
    )
    z_lm = reference.head_logits(hidden, head.lm_weight, None)
    z_rm = reference.reward_logits(hidden, head.reward_head.weight, None, None)
    expected = reference.mix_logits(z_lm, z_rm, torch.sigmoid(logit), config.mix, 1.0, 0.0)
    cache = head.new_cache(B, T)
    for t in range(T):
        step = head.step(hidden[:, t], cache)
        torch.testing.assert_close(step.logits, expected[:, t], rtol=1e-4, atol=1e-4)
        expect(torch.equal(step.token, expected[:, t].argmax(-1)), f"token {t} is another")


def trains() -> None:
    """Check the fused loss and its gradient against plain PyTorch."""
    head = dualhead_ext.DualHead(dualhead_ext.DualHeadConfig(hidden_size=D, vocab_size=V))
    hidden, labels = torch.randn(2 * B, T, D), torch.randint(V, (2 * B, T))
    weights = [head.reward_head.weight, head.gate.q_weight]
    logit = head.gate(hidden)
    batch = (hidden, labels, torch.ones(2 * B, T, dtype=torch.bool), logit)
    fused = functional.dual_head_loss(
        *batch, lm_weight=head.lm_weight, reward_weight=weights[0]
    ).loss
    heads = loss_reference.Heads(head.lm_weight, None, weights[0], None, None)
    pairing = Pairing(2 * B, [(p, B + p) for p in range(B)], None)
    plain = loss_reference.dual_head_loss(*batch, heads, LossOptions(), pairing).loss
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (fused, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def dualhead(*words: str) -> str:
    """Standard output of the installed command."""
    command = [str(Path(sys.executable).with_name("dualhead")), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    expect(done.returncode == 0, f"{' '.join(words)}: {done.stderr}")
    return done.stdout


def main() -> None:
    torch.manual_seed(0)
    version = installed()
    decodes()
    trains()
    for command in ("--version", "info"):
        said = dualhead(command)
        expect(version in said, f"dualhead {command} does not name {version}: {said}")
    if "--command-line" in sys.argv[1:]:
        dualhead("train", "--output", "heads", "--limit", "16")
        expect(bool(dualhead("generate", "heads", "Hello").strip()), "generate printed nothing")
    isa = dualhead_ext.build_info()["cpu_isa"]
    print(
        f"dualhead_ext {version}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{isa}: installed, decodes and trains as the reference"
    )


if __name__ == "__main__":
    main()
