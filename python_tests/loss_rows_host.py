# SPDX-License-Identifier: Apache-2.0
"""The loss's operators by the CUDA kernel, compiled for the host backend.

The functions have the names of those in `dualhead_ext.ops`, and take tensors on the CPU.
"""

import contextlib
import functools

import native
import pytest
import torch

from dualhead_ext import ops

_GUARD = 64  # elements around each output; nothing may write to them


# Cached: native.testing_module checks on each call what is out of date
_module = functools.cache(native.testing_module)


def _guarded(*shape, dtype=torch.float32):
    """A view of NaN inside a larger tensor of 7s; returns (check, view)."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * _GUARD,), 7, dtype=dtype)
    view = whole[_GUARD : _GUARD + size].view(shape).fill_(torch.nan)

    def check():
        assert (whole[:_GUARD] == 7).all() and (whole[_GUARD + size :] == 7).all()

    return check, view


def _call(arguments, outputs, backward):
    arrays = {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | {k: view for k, (_, view) in outputs.items()}).items()
    }
    assert _module().loss_rows(arrays, backward) == "cudaSuccess"
    for check, _ in outputs.values():
        check()


def loss_rows(z_lm, z_rm, gate_logit, labels, mixed, reward, mix_probs, scale, softcap):
    n = z_rm.shape[0]
    outputs = {"normalizers": _guarded(2, n, dtype=torch.float64)}
    outputs |= {"mixed": _guarded(n)} if mixed else {}
    outputs |= {"reward": _guarded(n)} if reward else {}
    arguments = {"z_lm": z_lm, "z_rm": z_rm, "gate_logit": gate_logit, "labels": labels}
    arguments |= {"mix_probs": mix_probs, "logit_scale": scale, "logit_softcap": softcap}
    _call(arguments, outputs, backward=False)
    nothing = z_rm.new_empty(0)
    names = ("mixed", "reward", "normalizers")
    return tuple(outputs[name][1] if name in outputs else nothing for name in names)


def loss_rows_backward_(
    z_lm, z_rm, gate_logit, labels, normalizers, mixed, mixed_grad, reward_grad, write_lm,
    mix_probs, scale, softcap,
):  # fmt: skip
    outputs = {} if mixed is None else {"gate_grad": _guarded(z_rm.shape[0])}
    arguments = {"z_lm": z_lm, "z_rm": z_rm, "gate_logit": gate_logit, "labels": labels}
    arguments |= {"normalizers": normalizers, "mixed": mixed, "mixed_grad": mixed_grad}
    arguments |= {"reward_grad": reward_grad, "write_lm": write_lm and mixed is not None}
    arguments |= {"mix_probs": mix_probs, "logit_scale": scale, "logit_softcap": softcap}
    _call(arguments, outputs, backward=True)
    return outputs["gate_grad"][1] if outputs else z_rm.new_empty(0)


@contextlib.contextmanager
def on_the_host_backend(**device):
    """Use `dualhead_ext.loss.rows` with the CUDA kernel. device: options of the module's
    set_device.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "loss_rows", loss_rows)
        patch.setattr(ops, "loss_rows_backward_", loss_rows_backward_)
        _module().set_device(**device)
        try:
            yield
        finally:
            _module().set_device()
