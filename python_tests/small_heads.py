# SPDX-License-Identifier: Apache-2.0
"""Small random gated heads."""

import torch

from dualhead_ext.config import DualHeadConfig
from dualhead_ext.head.dual_head import DualHead

D, V = 24, 37


def make_head(seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "vocab_size": V, "gate_num_heads": 3, "gate_head_dim": 5}
    head = DualHead(DualHeadConfig(**sizes | config)).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.4)
    return head
