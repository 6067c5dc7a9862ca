# SPDX-License-Identifier: Apache-2.0
"""``dualhead generate``: a prompt's continuation as it comes, with the alpha of each token."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Any

from ..data import HUMAN
from ..data.rendering import messages_of, render_prompt
from ..model.builtin_backbones import backbone_path
from . import terminal as show
from .errors import UserError, argument
from .models import check_device, loading, quiet_transformers

# Name of a sampling filter -> the value that does nothing.
_FILTERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_CONTROLS = ("strength", "gate_offset", "alpha", "max_kl", "skip_threshold", "objective_weights")


def generate(arguments: Namespace) -> None:
    """Print the text as it comes."""
    _refuse_gate_without_heads(arguments)
    prompt = _prompt(arguments)
    with argument():
        to = show.console(arguments.color)
        quiet_transformers(arguments.backbone)
        import torch
    model, tokenizer = load(arguments)
    inputs = encode(prompt, tokenizer, raw=arguments.raw).to(model.device)
    _check_length(inputs["input_ids"].shape[1], model, arguments.max_new_tokens)
    options = _options(arguments, model)
    if arguments.show_gate:
        show.print_legend(to)
    stream = TokenStream(tokenizer, to, model if arguments.show_gate else None)
    torch.manual_seed(arguments.seed)
    model.generate(**inputs, streamer=stream, **options)


def _refuse_gate_without_heads(arguments: Namespace) -> None:
    if not arguments.backbone_only:
        return
    for name in (*_CONTROLS, "show_gate", "quantize"):
        if getattr(arguments, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"--backbone-only: expected no option of the gate or heads with it, got {option}"
            )


def _prompt(arguments: Namespace) -> str:
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("prompt: expected an argument or text on standard input, got neither")
        with argument("standard input"):
            prompt = sys.stdin.read()
    try:
        prompt.encode()
    except UnicodeEncodeError:  # how Python passes on bytes that are not UTF-8
        raise UserError("prompt: expected UTF-8 text, got other bytes") from None
    if not arguments.raw:
        prompt = prompt.strip()
    if not prompt:
        raise UserError("prompt: expected some text, got none")
    return prompt


def _check_length(length: int, model: Any, new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and length + new_tokens > context:
        raise UserError(
            f"--max-new-tokens: expected at most {max(context - length, 0)}, as the prompt has "
            f"{length} tokens and the model a context of {context}, got {new_tokens}"
        )


def _options(arguments: Namespace, model: Any) -> dict[str, Any]:
    """Keyword arguments of ``generate``."""
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    filters = {name: getattr(arguments, name) for name in _FILTERS}
    if arguments.sample or any(value is not None for value in filters.values()):
        options["do_sample"] = True
        for name, off in _FILTERS.items():
            options[name] = off if filters[name] is None else filters[name]
    options |= {n: getattr(arguments, n) for n in _CONTROLS if getattr(arguments, n) is not None}
    if (weights := arguments.objective_weights) is not None:
        import torch

        count = model.dual_head_config.num_objectives
        if len(weights) != count:
            raise UserError(
                f"--objective-weights: expected {count} numbers, one for each objective of the "
                f"heads, got {len(weights)}"
            )
        options["objective_weights"] = torch.tensor(weights)
    return options


def load(arguments: Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder of heads, and of its backbone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..model.attachment import detach
    from ..model.causal_lm import DualHeadForCausalLM

    check_device(arguments.device)
    heads, backbone = arguments.heads, arguments.backbone
    if not os.path.isdir(heads) and heads.count("/") != 1:  # no hub name either
        raise UserError(f"heads: expected a folder written by train, got {heads}, which is none")
    if backbone is not None:
        with loading("--backbone", backbone):
            path = backbone_path(backbone)
            backbone = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with loading("heads", heads):
        model = DualHeadForCausalLM.from_pretrained(
            heads, backbone=backbone, quantize=arguments.quantize
        )
    with argument("--backbone"):
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if arguments.backbone_only and model.lm_head_module.quantized is None:
        model = detach(model)
    elif arguments.backbone_only:  # what was its own LM head is gone
        model = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype="auto")
    cuda = arguments.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else arguments.device
    return model if device == "auto" else model.to(device), tokenizer


class TokenStream:
    """A streamer for ``generate``: prints each token as it is chosen.

    Args:
        tokenizer: turns ids into text.
        to: the console.
        model: whose lm_head knows the alpha of the token just chosen; None to show none.
    """

    def __init__(self, tokenizer: Any, to: Any, model: Any = None) -> None:
        self._text, self._to, self._model = show.TokenText(tokenizer), to, model
        self._prompt_passed = False

    def put(self, value: Any) -> None:
        """One new token, int64 (1,); first of all the prompt (1, T), which is not printed."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        alpha = None
        if self._model is not None:
            alpha = float(self._model.lm_head_module.last_alpha[0, -1])
        for token in value.flatten().tolist():
            show.print_token(self._to, self._text.push(token), alpha)

    def end(self) -> None:
        """No more tokens."""
        show.print_token(self._to, self._text.flush())
        self._to.file.write("\n")
        self._to.file.flush()


def encode(prompt: str, tokenizer: Any, raw: bool = False) -> Any:
    """The tokens of a prompt: as it is if ``raw``, else as the training data is laid out
    (:mod:`dualhead_ext.data.rendering`): a dialogue in HH-RLHF's layout turn by turn, other text
    as one
    turn of the user.
    """
    if raw:
        return tokenizer(prompt, return_tensors="pt")
    dialogue = prompt.lstrip().startswith(HUMAN.strip())
    messages = messages_of(prompt) if dialogue else [{"role": "user", "content": prompt}]
    text, templated = render_prompt(messages, tokenizer)
    return tokenizer(text, return_tensors="pt", add_special_tokens=not templated)
