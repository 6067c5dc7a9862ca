# SPDX-License-Identifier: Apache-2.0
"""Preference rows to batches of tokens: tokenisation, response masks by offsets, padding."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import DataReport, score_pairs
from .rendering import Rendered, render

logger = logging.getLogger(__name__)


def encode(
    prompt: Any, response: Any, tokenizer: Any, max_length: int, ended: bool = True
) -> dict[str, Any]:
    """Tokenise a prompt and its response, strings or messages: ``input_ids``, ``completion_mask``
    and ``truncated``.

    - The whole text (:func:`dualhead_ext.data.rendering.render`) is tokenised at once. A token
      belongs to the response if it contains a character that the assistant says. With a chat
      template the prompt's tokens are those with which decoding begins.
    - The response ends with the template's end of turn, or else with EOS, which is trained too,
      unless the response was cut off (``ended`` is False).
    - BOS is added at the start if the tokenizer adds it; a chat template decides this itself.
    - If the text is longer than ``max_length``, the prompt is cut from the left, then the response
      from the right.

    Raises:
        ValueError, TypeError, jinja2.TemplateError: the chat template or the tokenizer refuses the
            text.
    """
    rendered, eos = render(prompt, response, tokenizer), tokenizer.eos_token_id
    ids, offsets = _tokens(rendered, tokenizer)
    spans = rendered.spans
    if not ended and spans:
        spans = [*spans[:-1], (spans[-1][0], spans[-1][1] - rendered.closing)]
    mask = _mask(offsets, spans)
    if response and 1 not in mask:
        raise ValueError("the assistant says nothing in the response")
    while mask and response and not mask[-1]:  # a last turn that is not the assistant's
        ids.pop()
        mask.pop()
    if ended and eos is not None and not rendered.closed and (not ids or ids[-1] != eos):
        ids.append(eos)
        mask.append(1)
    head = []
    if rendered.prompt_end is None and _adds_bos(tokenizer):
        head = [tokenizer.bos_token_id] if ids[:1] != [tokenizer.bos_token_id] else []
    first = mask.index(1) if 1 in mask else len(ids)
    room = max_length - len(head)
    truncated = len(ids) > room
    drop = min(max(len(ids) - room, 0), first)
    ids, mask = ids[drop:][:room], mask[drop:][:room]
    return {
        "input_ids": head + ids,
        "completion_mask": [0] * len(head) + mask,
        "truncated": truncated,
    }


def _tokens(rendered: Rendered, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) of a text. If the end of a chat template's prompt and the beginning of the
    answer would share a token, they are tokenised separately, as in decoding.
    """

    def coded(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(out["input_ids"]), list(out["offset_mapping"])

    ids, offsets = coded(rendered.text)
    seam = rendered.prompt_end
    if seam is None:
        return ids, offsets
    prompt, prompt_offsets = coded(rendered.text[:seam])
    if ids[: len(prompt)] == prompt:
        return ids, offsets
    rest, rest_offsets = coded(rendered.text[seam:])
    if tokenizer.decode(rest, skip_special_tokens=False) != rendered.text[seam:]:
        return ids, offsets  # the tokenizer changes the beginning of a text
    return prompt + rest, prompt_offsets + [(a + seam, b + seam) for a, b in rest_offsets]


def _mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token with a character in one of the spans, which are sorted."""
    mask, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        mask.append(int(current < len(spans) and spans[current][0] < end and start < end))
    return mask


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]


def tokenize_pairs(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    max_length: int = 512,
    source: str = "tokenize_pairs",
) -> list[dict[str, Any]]:
    """Tokenise preference rows. A pair gives ``chosen_input_ids``, ``chosen_completion_mask`` and
    the same for rejected. A ranked list gives ``response_input_ids`` and
    ``response_completion_mask``, one entry for each response, and ``scores``. Both have
    ``objective`` (default 0).

    The log says how many texts were cut to ``max_length``, and which rows (from 0) were skipped
    because the chat template or the tokenizer refuses them. source: the name of the rows there.

    Raises:
        ValueError: a tokenizer without offsets (a slow one), max_length below 2, or no usable row.
    """
    check_tokenizer(tokenizer, max_length)
    report, coded_rows, texts, cut = DataReport(source, place="row"), [], 0, 0
    for number, row in enumerate(rows):
        coded = tokenize_row(number, row, tokenizer, max_length, report)
        if coded is None:
            continue
        texts += len(coded)
        cut += sum(text["truncated"] for text in coded)
        coded_rows.append(coded_row(row, coded))
    report.kept = len(coded_rows)
    if report.skipped:
        if not coded_rows:
            raise ValueError(f"tokenize_pairs: no usable row in {report}")
        logger.warning("%s", report)
    if cut:
        logger.warning(
            "%d of %d texts were longer than max_length = %d and cut", cut, texts, max_length
        )
    return coded_rows


def check_tokenizer(tokenizer: Any, max_length: int) -> None:
    """Raise ValueError for a tokenizer without offsets, or max_length below 2."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenize_pairs: tokenizer must be a fast one: response masks need character offsets"
        )
    if max_length < 2:
        raise ValueError(f"tokenize_pairs: max_length must be at least 2, got {max_length}")


def tokenize_row(
    number: int, row: dict[str, Any], tokenizer: Any, max_length: int, report: DataReport
) -> list[dict[str, Any]] | None:
    """:func:`encode` for each text of a row. None if the chat template or the tokenizer refuses a
    text; the report says so.
    """
    responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    ended = row.get("ended") or [True] * len(responses)
    try:
        return [
            encode(row["prompt"], text, tokenizer, max_length, end)
            for text, end in zip(responses, ended, strict=True)
        ]
    except _refusals() as error:
        report.skip(" ".join(str(error).split()) or type(error).__name__, number)
        return None


def _refusals() -> tuple[type[Exception], ...]:
    """The exceptions with which chat templates and tokenizers refuse a row."""
    kinds = (ValueError, TypeError, KeyError)
    try:
        from jinja2 import TemplateError
    except ImportError:  # then there are no chat templates
        return kinds
    return (*kinds, TemplateError)


def coded_row(row: dict[str, Any], coded: list[dict[str, Any]]) -> dict[str, Any]:
    """A row as :func:`tokenize_pairs` returns it, from the result of :func:`tokenize_row`."""
    out: dict[str, Any] = {"objective": row.get("objective", 0)}
    for name in ("input_ids", "completion_mask"):
        parts = [text[name] for text in coded]
        if "responses" in row:
            out[f"response_{name}"] = parts
        else:
            out[f"chosen_{name}"], out[f"rejected_{name}"] = parts
    if "responses" in row:
        out["scores"] = row["scores"]
    return out


def is_tokenized(row: dict[str, Any]) -> bool:
    """Whether a row is tokenised, by :func:`tokenize_pairs` or by TRL."""
    return any(name in row for name in ("chosen_input_ids", "chosen_ids", "response_input_ids"))


def texts_of(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(token ids, completion mask) of each text of a tokenised row: chosen and rejected, or the
    responses of a ranked list.
    """
    if "response_input_ids" in row:
        masks = row["response_completion_mask"]
        return list(zip(row["response_input_ids"], masks, strict=True))
    if "chosen_input_ids" in row:
        return [
            (row[f"{side}_input_ids"], row[f"{side}_completion_mask"])
            for side in ("chosen", "rejected")
        ]
    prompt, responses = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    return [([*prompt, *text], [0] * len(prompt) + [1] * len(text)) for text in responses]


def batch_order(ranked: bool, counts: Sequence[int]) -> list[tuple[int, int]]:
    """(row, text) of each sequence in a batch whose rows have ``counts`` texts: all chosen, then
    all rejected; ranked lists one after the other.
    """
    if ranked:
        return [(row, text) for row, count in enumerate(counts) for text in range(count)]
    return [(row, text) for text in (0, 1) for row in range(len(counts))]


class PreferenceCollator:
    """Makes batches like TRL's: ``[all chosen; all rejected]``, right-padded.

    >>> chosen = {"chosen_input_ids": [1, 5, 6], "chosen_completion_mask": [0, 0, 1]}
    >>> rejected = {"rejected_input_ids": [1, 5], "rejected_completion_mask": [0, 1]}
    >>> batch = PreferenceCollator(pad_token_id=0)([chosen | rejected])
    >>> batch["input_ids"].tolist(), batch["completion_mask"].tolist()
    ([[1, 5, 6], [1, 5, 0]], [[0, 0, 1], [0, 1, 0]])

    It also accepts TRL's columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids``. It returns
    input_ids, attention_mask, completion_mask (R, T) int64, R = 2P, and objective (P,) int64.

    For ranked lists, R is the number of all responses, one list after the other. ``pairs`` (P, 2)
    int64 holds (better row, worse row) for every two responses with different scores.

    >>> texts = {"response_input_ids": [[1, 5], [1, 6], [1, 7]]}
    >>> masks = {"response_completion_mask": [[0, 1]] * 3}
    >>> row = texts | masks | {"scores": [0.5, 2.0, 0.5]}
    >>> PreferenceCollator(pad_token_id=0)([row])["pairs"].tolist()
    [[1, 0], [1, 2]]

    With ``padding_free=True`` the R sequences are concatenated: input_ids, completion_mask and
    position_ids (1, N), which start at 0 in each sequence, and objective (P,).

    Raises:
        ValueError: pairs and ranked lists in one batch; scores that are not one finite number for
            each response, or are all equal.
    """

    def __init__(
        self, pad_token_id: int, pad_to_multiple_of: int = 1, padding_free: bool = False
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts, ranked = [texts_of(row) for row in rows], _all_ranked(rows)
        order = batch_order(ranked, [len(row) for row in texts])
        sides = [texts[row][text] for row, text in order]
        batch = self._packed(sides) if self.padding_free else self._padded(sides)
        objectives = [row.get("objective", 0) for row in rows]
        if ranked:
            found = [_ranked_pairs(row) for row in rows]
            starts = itertools.accumulate((len(row) for row in texts), initial=0)
            pairs = [
                (start + better, start + worse)
                for start, row in zip(starts, found, strict=False)
                for better, worse in row
            ]
            batch["pairs"] = torch.tensor(pairs)
            objectives = [
                objective for objective, row in zip(objectives, found, strict=True) for _ in row
            ]
        batch["objective"] = torch.tensor(objectives)
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


def _all_ranked(rows: Sequence[dict[str, Any]]) -> bool:
    ranked = ["response_input_ids" in row for row in rows]
    if any(ranked) and not all(ranked):
        raise ValueError(
            "PreferenceCollator: rows must be all pairs or all ranked lists, got "
            f"{len(ranked) - sum(ranked)} pairs and {sum(ranked)} ranked lists in one batch"
        )
    return any(ranked)


def _ranked_pairs(row: dict[str, Any]) -> list[tuple[int, int]]:
    scores, count = row["scores"], len(row["response_input_ids"])
    if len(scores) != count or not all(math.isfinite(score) for score in scores):
        raise ValueError(
            f"PreferenceCollator: scores must be {count} finite numbers, one for each response, "
            f"got {scores!r}"
        )
    pairs = score_pairs(scores)
    if not pairs:
        raise ValueError(f"PreferenceCollator: scores must hold two different ones, got {scores!r}")
    return pairs
