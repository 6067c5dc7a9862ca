# SPDX-License-Identifier: Apache-2.0
"""Conversion of command-line arguments to options of ``generate``, and of prompts to tokens."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from ..data import HUMAN
from ..data.rendering import messages_of, render_prompt
from ..head.controls import Controls, Sampling
from .errors import UserError


def as_utf8(text: str) -> str:
    """A text from the command line or standard input. If the locale's encoding is not UTF-8, Python
    represents the bytes of UTF-8 text as surrogates.

    Raises:
        ValueError: other bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise ValueError("expected UTF-8 text, got other bytes") from None
    return text


def check_length(length: int, model: Any, new_tokens: int) -> None:
    """Raise UserError if a prompt of ``length`` tokens leaves no room for ``new_tokens`` more. The
    message says how many fit.
    """
    context = context_of(model)
    if context is not None and length + new_tokens > context:
        raise UserError(
            f"--max-new-tokens: expected at most {max(context - length, 0)}, as the prompt has "
            f"{length} tokens and the model a context of {context}, got {new_tokens}"
        )


def context_of(model: Any) -> int | None:
    """A model's context length in tokens; None if its config does not have it."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def decoding_options(arguments: Namespace, model: Any) -> dict[str, Any]:
    """Keyword arguments of ``generate``."""
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    filters = {name: getattr(arguments, name) for name in Sampling.FILTERS}
    if arguments.sample or any(value is not None for value in filters.values()):
        options["do_sample"] = True
        for name, off in Sampling.FILTERS.items():
            options[name] = off if filters[name] is None else filters[name]
    return options | gate_options(arguments, model)


def gate_options(arguments: Namespace, model: Any) -> dict[str, Any]:
    """The gate's controls in the arguments, as ``generate`` takes them."""
    options = {
        n: getattr(arguments, n) for n in Controls.NAMES if getattr(arguments, n) is not None
    }
    if (weights := arguments.objective_weights) is not None:
        options["objective_weights"] = objective_tensor("--objective-weights", weights, model)
    return options


def objective_tensor(option: str, weights: list[float], model: Any) -> Any:
    """The weights (K,) of a model's objectives as a tensor.

    Raises:
        UserError: another number of weights.
    """
    import torch

    count = model.dual_head_config.num_objectives
    if len(weights) != count:
        raise UserError(
            f"{option}: expected as many weights as the heads have objectives, {count}, got "
            f"{len(weights)}"
        )
    return torch.tensor(weights)


def controls_of(options: dict[str, Any]) -> dict[str, Any]:
    """The gate's controls in options of ``generate``."""
    return {name: options[name] for name in Controls.NAMES if name in options}


def encode(prompt: str, tokenizer: Any, raw: bool = False) -> Any:
    """The tokens of a prompt. If ``raw``, the prompt is used as it is. Otherwise it is rendered
    like training data (:mod:`dualhead_ext.data.rendering`): a dialogue in HH-RLHF's layout turn by
    turn, other text as one user turn.
    """
    if raw:
        return tokenizer(prompt, return_tensors="pt")
    dialogue = prompt.lstrip().startswith(HUMAN.strip())
    messages = messages_of(prompt) if dialogue else [{"role": "user", "content": prompt}]
    text, templated = render_prompt(messages, tokenizer)
    return tokenizer(text, return_tensors="pt", add_special_tokens=not templated)
