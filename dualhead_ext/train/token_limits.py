# SPDX-License-Identifier: Apache-2.0
"""Checks before training that token ids and positions are within the backbone's embeddings.
Otherwise training would crash, on a GPU with an error that does not name the cause.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..data.collate import texts_of

# Names of learned position embeddings: GPT-2 and its relatives, OPT, BERT-like decoders.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


def learned_positions(model: Any) -> int | None:
    """The number of learned positions; None if positions are computed (rotary, ALiBi)."""
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


def row_check(
    name: str, model: Any, max_length: int, pad_token_id: Any
) -> Callable[[int, dict[str, Any]], None]:
    """A function (row number, tokenised row) that raises ValueError for a token id outside the
    embedding, or a text longer than the learned positions.

    Raises:
        ValueError: pad_token_id is outside the embedding.
    """
    size, positions = model.get_input_embeddings().num_embeddings, learned_positions(model)
    if isinstance(pad_token_id, int) and not 0 <= pad_token_id < size:
        raise ValueError(
            f"DualHeadTrainer: pad_token_id must be below {size}, the rows of the backbone's "
            f"embedding, got {pad_token_id}; resize the backbone or choose another pad token"
        )

    def check(number: int, row: dict[str, Any]) -> None:
        for ids, _ in texts_of(row):
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= size:
                raise ValueError(
                    f"DualHeadTrainer: {name}: token ids must be below {size}, the rows of the "
                    f"backbone's embedding, got {low if low < 0 else high} in row {number}; is "
                    "this the backbone's tokenizer?"
                )
            if positions is not None and len(ids) > positions:
                raise ValueError(
                    f"DualHeadTrainer: {name}: texts must have at most {positions} tokens, the "
                    f"positions that the backbone has learned, got {len(ids)} in row {number} "
                    f"(max_length={max_length})"
                )

    return check


def check_limits(
    name: str, rows: Sequence[dict[str, Any]], model: Any, max_length: int, pad_token_id: Any
) -> None:
    """Check all rows with :func:`row_check`."""
    check = row_check(name, model, max_length, pad_token_id)
    for number in range(len(rows)):
        check(number, rows[number])
