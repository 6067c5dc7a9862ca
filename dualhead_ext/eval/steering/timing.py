# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a system and of the plain backbone with ``generate()``, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ...model.causal_lm import DualHeadForCausalLM
from ..decoding import genarm, plain
from ..sampling import encode_prompts
from .attributes import OPEN, prompts_of
from .training import load_guide

ROWS, TURNS = 8, 5


def tokens_per_second(
    use: Any, method: str | None, folder: Path | None, new_tokens: int
) -> list[tuple[float, float]]:
    """(plain, system) tokens per second of each turn, after a warm-up turn: 8 requests, greedy.

    Args:
        use: `steps.Resources` with a backbone.
        method: the method that trained the system; None times the backbone against itself.
        folder: folder of the trained system.
    """
    ids, mask = encode_prompts(use.texts(prompts_of(OPEN, "measure", ROWS)), use.tokenizer)
    inputs = {"input_ids": ids.to(use.model.device), "attention_mask": mask.to(use.model.device)}
    system = _decoder(use, method, folder)
    options = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": use.tokenizer.pad_token_id,
    }

    def rate(decode: Callable[..., Tensor]) -> float:
        started = time.perf_counter()
        out = decode(inputs, **options)
        if out.is_cuda:
            torch.cuda.synchronize()
        return ids.shape[0] * (out.shape[1] - ids.shape[1]) / (time.perf_counter() - started)

    def baseline(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        return plain(use.model, inputs, **options)

    found = [(rate(baseline), rate(system)) for _ in range(TURNS + 1)]
    return found[1:]


def _decoder(use: Any, method: str | None, folder: Path | None) -> Callable[..., Tensor]:
    if method == "dual_head":
        backbone = AutoModelForCausalLM.from_pretrained(use.path, dtype=torch.float32)
        backbone = backbone.to(use.model.device)
        model = DualHeadForCausalLM.from_pretrained(folder, backbone=backbone).eval()
        return lambda inputs, **options: plain(model, inputs, **options)
    if method == "autoregressive_reward":
        guide = load_guide(method, folder, use.path).to(use.model.device)

        def decode(inputs: dict[str, Tensor], **options: Any) -> Tensor:
            return genarm(use.model, inputs, reward_models=[guide], strengths=[1.0], **options)

        return decode
    return lambda inputs, **options: plain(use.model, inputs, **options)
