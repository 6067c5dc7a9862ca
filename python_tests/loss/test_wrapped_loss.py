# SPDX-License-Identifier: Apache-2.0
"""The loss inside a wrapped model: torch.compile, activation checkpointing and FSDP.

test_trainer.py covers DDP. A run of 60 steps is compared with eager's.
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model
from torch.utils.checkpoint import checkpoint
from torchrun import run_in_two_processes
from trainer_cases import make_trainer, pairs

from dualhead_ext.data.collate import PreferenceCollator
from dualhead_ext.loss import reference as reference_loss
from dualhead_ext.train.trainer import prepare_for_training


def make_case(rows=None):
    model = make_model("llama").double()
    prepare_for_training(model)
    return model, PreferenceCollator(0)(pairs(4) if rows is None else rows) | {"loss_options": {}}


def gradients(loss, model):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return dict(zip(dict(named), torch.autograd.grad(loss, [p for _, p in named]), strict=True))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_in_a_compiled_model():
    """The graph breaks at the loss, which is not traced. Gradients still flow through it."""
    model, batch = make_case()
    expected = model(**batch).loss
    compiled = torch.compile(model, backend="aot_eager")
    got = compiled(**batch).loss
    torch.testing.assert_close(got, expected)
    assert_same(gradients(got, model), gradients(expected, model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    model, batch = make_case()
    expected = model(**batch).loss
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = checkpoint(lambda x: model(**batch).loss + x, anchor, use_reentrant=reentrant)
    loss.backward()
    for parameter, exact in zip(wanted, gradients(expected, model).values(), strict=True):
        torch.testing.assert_close(parameter.grad, exact)


@pytest.mark.slow
def test_in_a_model_sharded_by_fsdp(tmp_path):
    run_in_two_processes("fsdp_loss.py", tmp_path)
    got = load_file(tmp_path / "gradients.safetensors")
    means = None
    for row in pairs(2):
        model, batch = make_case([row])
        one = gradients(model(**batch).loss, model)
        means = {n: (0 if means is None else means[n]) + g / 2 for n, g in one.items()}
    assert_same(got, means)


def with_reference_loss(model, arguments, named):
    """A forward's hook: the loss of the call is computed by the reference."""
    options = named["loss_options"] | {"impl": reference_loss.dual_head_loss}
    return arguments, named | {"loss_options": options}


@pytest.mark.slow
def test_60_steps_follow_eager(tmp_path):
    """The same fp32 run twice, fused and eager.

    The losses may differ as much as those of eager runs whose initial weights differ in the last
    bit.
    """

    def run(name, eager=False, nudge=0.0):
        model = make_model("llama")
        if eager:
            model.register_forward_pre_hook(with_reference_loss, with_kwargs=True)
        with torch.no_grad():
            model.lm_head_module.reward_head.weight.mul_(1 + nudge)
        trainer = make_trainer(tmp_path / name, model, pairs(64), max_steps=60)
        trainer.train()
        return torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e])

    fused = run("fused")
    eager = run("eager", eager=True)
    nudged = run("nudged", eager=True, nudge=torch.finfo(torch.float32).eps)
    assert len(fused) == len(eager) == 60 and eager[-10:].mean() < 0.9 * eager[:10].mean()
    noise = (nudged - eager).abs().max()
    assert (fused - eager).abs().max() <= 10 * noise + 1e-5 * eager.abs().max()
