# SPDX-License-Identifier: Apache-2.0
"""Inspection of a text: alpha and the predictions of both heads at each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..head.controls import Controls
from ..head.kl_cap import kl_from_backbone
from ..ops.logits import postprocess
from .inspection_page import Choice, InspectedToken, Inspection, page

# Positions per block; the logits of the mixture and of both heads are in memory for one block.
_POSITIONS = 32


@torch.inference_mode()
def inspect_tokens(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int] | Tensor,
    start: int = 1,
    top: int = 5,
    label: str = "",
    **controls: Any,
) -> Inspection:
    """One pass over a text: alpha, KL divergence and both heads' distributions at each token.

    Args:
        model: a `DualHeadForCausalLM`. tokenizer: its tokenizer.
        ids: (T,), of prompt and text.
        start: the first token to inspect; at least 1 (default), as nothing predicts token 0.
        top: the number of most probable tokens to keep. Default 5.
        label: see :class:`Inspection`.
        controls: the fields of :class:`dualhead_ext.head.controls.Controls`.
    Raises:
        ValueError: start or top out of range, or a control. TypeError: an unknown control.
        NotImplementedError: the backbone changes its logits in a way that its config does not say.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    if not 1 <= start <= ids.shape[1]:
        raise ValueError(f"inspect_tokens: start must be in 1..{ids.shape[1]}, got {start}")
    config, head = model.dual_head_config, model.lm_head_module
    if not 1 <= top <= config.vocab_size:
        raise ValueError(f"inspect_tokens: top must be in 1..{config.vocab_size}, got {top}")
    if unknown := sorted(set(controls) - set(Controls.NAMES)):
        raise TypeError(f"inspect_tokens: unknown controls {', '.join(unknown)}")
    if head.knows_f is False:
        raise NotImplementedError(
            f"inspect_tokens: {type(model).__name__} changes its logits in a way that its config "
            "does not say (logit_scale, logit_softcap)"
        )
    ids = ids.to(model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False)[0].to(head.weight.device)
    gate_logit = head.gate(hidden)
    rows = head.control_rows("inspect_tokens", Controls(**controls), hidden)
    post = (config.logit_scale, config.logit_softcap)
    text, found = _TextOf(tokenizer, ids[0, :start].tolist()), []
    for first in range(start, ids.shape[1], _POSITIONS):
        positions = slice(first - 1, min(first - 1 + _POSITIONS, ids.shape[1] - 1))
        x, chosen = hidden[:, positions], ids[0, positions.start + 1 : positions.stop + 1]
        out = head.mixed(x, gate_logit[:, positions], rows)
        z_lm = head.lm_logits(x)
        z_rm = head.reward_logits(x, z_lm, rows.objective_weights)
        kl = kl_from_backbone(z_lm, z_rm, out.alpha, config.mix, *post)[0].tolist()
        logits = (out.logits, postprocess(z_lm, *post), postprocess(z_rm, *post))
        shares = [torch.softmax(z[0].float(), -1) for z in logits]
        own = [p.gather(1, chosen[:, None])[:, 0].tolist() for p in shares]
        best = [_choices(p, top, tokenizer) for p in shares]
        alphas = out.alpha[0].tolist()
        for i, token in enumerate(chosen.tolist()):
            found.append(
                InspectedToken(
                    token,
                    text.push(token),
                    alphas[i],
                    max(kl[i], 0.0),
                    (own[0][i], own[1][i], own[2][i]),
                    *(choices[i] for choices in best),
                )
            )
    return Inspection(tuple(found), label, text.prompt)


def inspect_text(
    model: Any, tokenizer: Any, text: str, prompt: str = "", **options: Any
) -> Inspection:
    """:func:`inspect_tokens` for a text after a prompt, without a chat template.

    Raises:
        ValueError: no token of the text has a token before it.
    """
    before = tokenizer(prompt)["input_ids"] if prompt else tokenizer("")["input_ids"]
    ids = tokenizer(prompt + text)["input_ids"]
    # A token across the boundary belongs to the text.
    same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), None)
    start = max(1, min(len(before), len(ids)) if same is None else same)
    if start >= len(ids):
        raise ValueError(
            f"inspect_text: text must have a token after the first of all, got {text!r}"
        )
    return inspect_tokens(model, tokenizer, ids, start, **options)


def write_page(path: Any, runs: Sequence[Inspection], title: str) -> None:
    """Write a self-contained page of one or several runs; several get a slider.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write(page(runs, title))


def _choices(p: Tensor, top: int, tokenizer: Any) -> list[tuple[Choice, ...]]:
    """The most probable tokens of each row of p (N, V)."""
    values, tokens = p.topk(top, -1)
    return [
        tuple(Choice(tokenizer.decode([token]), value) for token, value in zip(*row, strict=True))
        for row in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


class _TextOf:
    """What each token adds to a text, special tokens included."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, prompt
        self._shown = self.prompt = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new
