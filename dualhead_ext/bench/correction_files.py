# SPDX-License-Identifier: Apache-2.0
"""The size of the files that ``save_pretrained`` writes for correction reward heads: fp32, at the
shape of a 7B model's LM head, with a fixed gate.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .comparisons import Comparison, Contest
from .correction_steps import RANKS
from .models import Llama

# Upper limit of the folder's size in bytes.
BYTES = {"embedding": 0.6e6, "lowrank": 10e6}
# The LM head has the size of a 7B model's; the layers do not matter.
SHAPE = Llama(4096, 1, 32, 16, 32000, tied=True)
TINY = Llama(64, 1, 4, 16, 512, tied=True)


def run_case(shape: Llama = SHAPE) -> Contest:
    """Save each correction and count the bytes of its folder."""
    from ..model.attachment import detach
    from ..model.causal_lm import DualHeadForCausalLM

    figures, comparisons = {}, {}
    plain = shape.build()
    for kind, rank in RANKS.items():
        model = DualHeadForCausalLM.from_backbone(
            plain, reward_head=kind, reward_rank=rank, gate="fixed"
        )
        model.lm_head_module.reward_head.to(torch.float32)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            count = sum(path.stat().st_size for path in Path(folder).iterdir())
        plain = detach(model)
        figures[kind] = {"rank": rank, "bytes": count}
        goal = BYTES[kind] if shape == SHAPE else None
        comparisons[kind] = [Comparison.exact("bytes", None, count, goal)]
    setting = {"d": shape.hidden, "V": shape.vocabulary, "format": "fp32"}
    return Contest("file", setting, figures, comparisons)
