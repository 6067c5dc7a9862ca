# SPDX-License-Identifier: Apache-2.0
"""What `generate()` of a gated model adds to transformers': the strength for a KL, a mask of new
positions, and alpha of each chosen token.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from ..head.calibration import strength_of_kl
from ..head.controls import Controls

logger = logging.getLogger(__name__)


def check_prompt(prompt: Tensor | None) -> None:
    """Refuse an empty prompt: ids (B, T) or embeddings (B, T, d).

    Raises:
        ValueError: B or T is 0.
    """
    if prompt is not None and 0 in prompt.shape[:2]:
        raise ValueError(
            "generate: expected one prompt or more, each of at least one token (the tokenizer's "
            f"beginning-of-sequence token, for example), got input of shape {tuple(prompt.shape)}"
        )


def add_controls_of(config: Any, kwargs: dict[str, Any]) -> None:
    """Add the controls that a generation config holds to the arguments of ``generate()``, which
    stand over them. A GenerationConfig keeps any attribute, so there they would be ignored.
    """
    held = {name: getattr(config, name, None) for name in (*Controls.NAMES, "kl")}
    if "strength" in kwargs or "kl" in kwargs:
        held["strength"] = held["kl"] = None
    for name, value in held.items():
        if value is not None:
            kwargs.setdefault(name, value)


def new_valid(inputs: dict[str, Any], attention_mask: Tensor | None) -> Tensor | None:
    """Which of the new positions are real tokens, (B, T) bool; None if the mask in ``inputs`` says
    it already. inputs: what transformers prepared for a forward.

    attention_mask: (B, columns), as it was before the preparation, which makes it 4-D for a static
    cache.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    new = embeds if ids is None else ids
    if attention_mask is not None and attention_mask.dim() == 2:
        # Cloned, as transformers does with ids: the stride of a slice would grow with the mask, and
        # each step would be recompiled.
        valid = attention_mask[:, -new.shape[1] :].bool()
        return valid.clone(memory_format=torch.contiguous_format)
    if attention_mask is None and inputs.get("attention_mask") is not None:
        # transformers drops a mask of ones, and builds the mask of a static cache without it.
        return torch.ones(new.shape[:2], dtype=torch.bool, device=new.device)
    return None


def strength_of(curve: list[list[float]] | None, kl: Any, kwargs: dict[str, Any]) -> Any:
    """The strength for ``kl``. kwargs: the other arguments of ``generate()``.

    Raises:
        ValueError, TypeError: strength is given too, or see :func:`.strength_of_kl`.
    """
    if kwargs.get("strength") is not None:
        raise ValueError("generate: kl and strength exclude each other; give one of them")
    weights = kwargs.get("objective_weights")
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if not torch.allclose(weights, torch.full_like(weights, 1 / weights.shape[-1])):
            logger.warning(
                "generate: kl: the curve was measured at uniform objective weights; at other "
                "weights the KL will differ"
            )
    return strength_of_kl(curve, kl)


@torch.no_grad()
def alpha_of(
    model: Any, sequences: Tensor, prompt: Tensor | None, kwargs: dict, controls: Controls
) -> Tensor:
    """alpha at each position where a token of ``sequences`` was chosen: (B, new tokens)."""
    repeats = 1 if prompt is None else sequences.shape[0] // prompt.shape[0]
    repeated = controls.repeat(repeats).given()
    mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if embeds is not None:
        embeds = embeds.repeat_interleave(repeats, 0)
        rest = model.get_input_embeddings()(sequences.to(embeds.device))
        inputs: dict[str, Any] = {"inputs_embeds": torch.cat((embeds, rest), 1)}
        start, total = embeds.shape[1], embeds.shape[1] + sequences.shape[1]
    else:
        start, total = (1 if prompt is None else prompt.shape[1]), sequences.shape[1]
        inputs = {"input_ids": sequences}
    if mask is not None:
        mask = mask.repeat_interleave(repeats, 0)
        ones = mask.new_ones(mask.shape[0], total - mask.shape[1])
        inputs["attention_mask"] = torch.cat((mask, ones), 1)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = positions
    keep = torch.arange(start - 1, total - 1, device=sequences.device)
    model(**inputs, **repeated, use_cache=False, logits_to_keep=keep)
    return model.lm_head_module.last_alpha
