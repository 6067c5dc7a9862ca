# SPDX-License-Identifier: Apache-2.0
"""Problems of the loss over rows of logits, with solutions in PyTorch and in float64."""

import torch

from dualhead_ext.loss import rows as loss_rows

SIZES = [(1, 1), (2, 3), (3, 15), (5, 16), (4, 17), (3, 63), (2, 1024), (3, 1025), (7, 4099)]


OPTIONS = {
    "logits": {},
    "probs": {"mix": "probs"},
    "post": {"logit_scale": 0.7, "logit_softcap": 5.0},
    "post_probs": {"mix": "probs", "logit_scale": -0.7, "logit_softcap": 5.0},
}


def problem(seed, n, V, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return {
        "z_lm": torch.randn(n, V, generator=g) * scale,
        "z_rm": torch.randn(n, V, generator=g) * scale,
        "gate_logit": torch.randn(n, generator=g) * 2,
        "labels": torch.randint(0, V, (n,), generator=g),
        "mixed_grad": torch.randn(n, generator=g),
        "reward_grad": torch.randn(n, generator=g),
    }


def run(p, options, mixed=True, reward=True, lm=True, impl=None):
    """{name: result}, by the kernel for fp32 and by PyTorch's operators for float64."""
    z_lm, z_rm = p["z_lm"].clone(), p["z_rm"].clone()
    rows = loss_rows.log_probabilities(
        z_lm if mixed else None, z_rm, p["gate_logit"], p["labels"], options, mixed=mixed,
        reward=reward, impl=impl,
    )  # fmt: skip
    found = {"mixed": rows.mixed, "reward": rows.reward}
    gate = loss_rows.gradients_(rows, p["mixed_grad"], p["reward_grad"] if reward else None, lm=lm)
    assert lm or torch.equal(z_lm, p["z_lm"])
    found |= {"gate": gate, "z_rm": z_rm, "z_lm": z_lm if mixed and lm else None}
    return {k: v for k, v in found.items() if v is not None}


def in_double(p):
    return {k: v.double() if v.is_floating_point() else v for k, v in p.items()}


def in_pytorch(p, *args, **kwargs):
    return run(p, *args, impl="torch", **kwargs)
