# SPDX-License-Identifier: Apache-2.0
"""Problems of the whole loss, solved by the chunked path and by the reference."""

import torch
from loss_cases import DIFFERENTIABLE

from dualhead_ext.functional import dual_head_loss
from dualhead_ext.loss import reference as reference_loss

WEIGHTS = ("lm_weight", "lm_bias", "reward_weight", "reward_bias")


def with_reference(function, *args, **kwargs):
    """The same call with the reference loss."""
    return function(*args, **kwargs, impl=reference_loss.dual_head_loss)


def loss_and_gradients(tensors, wanted=DIFFERENTIABLE, **options):
    """(output, {name: gradient})"""
    t = {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in tensors.items()}
    leaves = {n: t[n].requires_grad_() for n in wanted if n in t}
    out = dual_head_loss(**t, **options)
    out.loss.backward()
    return out, {n: leaf.grad for n, leaf in leaves.items()}


def objectives(seed, pairs, count):
    g = torch.Generator().manual_seed(seed)
    return {
        "objective": torch.randint(0, count, (pairs,), generator=g),
        "objective_weights": torch.rand(count, generator=g),
    }
