# SPDX-License-Identifier: Apache-2.0
"""From preference pairs to batches of tokens: one tokenisation of the whole text, response masks by
offsets, padding.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .data import ASSISTANT, HUMAN

_TURN = re.compile(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})")

logger = logging.getLogger(__name__)


def response_spans(response: str) -> list[tuple[int, int]]:
    """The parts of a response that the assistant says: all of it, but for role markers and human
    turns that a few responses of HH-RLHF hold.
    """
    spans, start, speaking = [], 0, True
    for match in _TURN.finditer(response):
        if speaking:
            spans.append((start, match.start()))
        start, speaking = match.end(), match.group() == ASSISTANT
    if speaking:
        spans.append((start, len(response)))
    return [span for span in spans if span[0] < span[1]]


def render(prompt: Any, response: Any, tokenizer: Any) -> tuple[str, str]:
    """(prompt, response) as text. Messages go through the tokenizer's chat template if it has one,
    else into HH-RLHF's layout.

    Raises:
        ValueError: a chat template that changes the prompt when a response follows.
    """
    if isinstance(prompt, str):
        return prompt, response
    if getattr(tokenizer, "chat_template", None):
        whole = tokenizer.apply_chat_template(prompt + response, tokenize=False)
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(start):
            raise ValueError(
                "the tokenizer's chat template renders a prompt differently once a response follows"
            )
        return start, whole[len(start) :]
    names = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT, "system": ""}
    turns = "".join(f"{names.get(m['role'], HUMAN)} {m['content']}" for m in prompt)
    return turns + ASSISTANT, "".join(f" {m['content']}" for m in response)


def encode(prompt: str, response: str, tokenizer: Any, max_length: int) -> dict[str, Any]:
    """One side of a pair as tokens: ``input_ids``, ``completion_mask`` and whether it was
    ``truncated``.

    The whole text is tokenised at once, so that there is no seam; a token belongs to the response
    if any of its characters does. BOS once at the start if the tokenizer adds it, EOS once at the
    end, part of the response. Too long: the prompt loses tokens from its left, then the response
    from its right.
    """
    text, eos = prompt + response, tokenizer.eos_token_id
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    spans = [(a + len(prompt), b + len(prompt)) for a, b in response_spans(response)]
    mask = [int(any(start < b and end > a for a, b in spans)) for start, end in offsets]
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
        mask.append(1)
    head = []
    if _adds_bos(tokenizer) and (not ids or ids[0] != tokenizer.bos_token_id):
        head = [tokenizer.bos_token_id]
    room = max_length - len(head)
    truncated = len(ids) > room
    drop = min(max(len(ids) - room, 0), first)
    ids, mask = ids[drop:][:room], mask[drop:][:room]
    return {
        "input_ids": head + ids,
        "completion_mask": [0] * len(head) + mask,
        "truncated": truncated,
    }


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]


def tokenize_pairs(
    rows: Iterable[dict[str, Any]], tokenizer: Any, max_length: int = 512
) -> list[dict[str, Any]]:
    """Preference rows as tokens: ``chosen_input_ids``, ``chosen_completion_mask``, the same for
    rejected, and ``objective`` (default 0). Says in the log how many texts were cut to
    ``max_length``.

    Raises:
        ValueError: a tokenizer without offsets (a slow one), or max_length below 2.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenize_pairs: tokenizer must be a fast one: response masks need character offsets"
        )
    if max_length < 2:
        raise ValueError(f"tokenize_pairs: max_length must be at least 2, got {max_length}")
    pairs, cut = [], 0
    for row in rows:
        pair: dict[str, Any] = {"objective": row.get("objective", 0)}
        for side in ("chosen", "rejected"):
            coded = encode(*render(row["prompt"], row[side], tokenizer), tokenizer, max_length)
            pair[f"{side}_input_ids"] = coded["input_ids"]
            pair[f"{side}_completion_mask"] = coded["completion_mask"]
            cut += coded["truncated"]
        pairs.append(pair)
    if cut:
        logger.warning(
            "%d of %d texts were longer than max_length = %d and cut",
            cut,
            2 * len(pairs),
            max_length,
        )
    return pairs


class PreferenceCollator:
    """Batches as TRL's: ``[all chosen; all rejected]``, right-padded.

    >>> chosen = {"chosen_input_ids": [1, 5, 6], "chosen_completion_mask": [0, 0, 1]}
    >>> rejected = {"rejected_input_ids": [1, 5], "rejected_completion_mask": [0, 1]}
    >>> batch = PreferenceCollator(pad_token_id=0)([chosen | rejected])
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[1, 5, 6], [1, 5, 0]], [[0, 0, 1], [0, 1, 0]])

    Also takes TRL's columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids``. Returns input_ids,
    attention_mask, completion_mask (2P, T) int64 and objective (P,) int64.

    ``padding_free=True``: the 2P sequences one after the other: input_ids, completion_mask and
    position_ids, which start again at 0 in each, (1, N), and objective (P,).
    """

    def __init__(
        self, pad_token_id: int, pad_to_multiple_of: int = 1, padding_free: bool = False
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sides = [self._side(row, side) for side in ("chosen", "rejected") for row in rows]
        batch = self._packed(sides) if self.padding_free else self._padded(sides)
        batch["objective"] = torch.tensor([row.get("objective", 0) for row in rows])
        return batch

    @staticmethod
    def _packed(sides: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        return {
            "input_ids": torch.tensor([[token for ids, _ in sides for token in ids]]),
            "completion_mask": torch.tensor([[bit for _, mask in sides for bit in mask]]),
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in sides])[None],
        }

    def _padded(self, sides: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in sides)
        longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(sides), longest), self.pad_token_id),
            "attention_mask": torch.zeros(len(sides), longest, dtype=torch.int64),
            "completion_mask": torch.zeros(len(sides), longest, dtype=torch.int64),
        }
        for row, (ids, mask) in enumerate(sides):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["completion_mask"][row, : len(ids)] = torch.tensor(mask)
        return batch

    @staticmethod
    def _side(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
        if f"{side}_input_ids" in row:
            return row[f"{side}_input_ids"], row[f"{side}_completion_mask"]
        prompt, response = row["prompt_ids"], row[f"{side}_ids"]
        return [*prompt, *response], [0] * len(prompt) + [1] * len(response)
