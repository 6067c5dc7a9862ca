# SPDX-License-Identifier: Apache-2.0
"""The training and evaluation rows of ``dualhead train``."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from typing import Any

from ..data import (
    EMBEDDED,
    PreferenceData,
    embedded_pairs_path,
    load_preference_data,
    preference_rows,
)
from ..data.files import stream_of
from .errors import UserError, argument

# Of a stream: number of first rows used for replies and checks; size of the shuffle buffer.
_SHOWN, _SHUFFLED = 64, 1000


def load(arguments: Namespace) -> tuple[list[dict], list[dict], list[dict]]:
    """(rows to train on, the same rows, held-out rows)."""
    with argument("--data"):
        rows: Any = load_preference_data(arguments.data, arguments.split)
    held_out: Any = []
    if arguments.eval_data is not None:
        with argument("--eval-data"):
            held_out = load_preference_data(arguments.eval_data)
    elif (
        arguments.data == EMBEDDED
        and arguments.split in (None, "train")
        and arguments.eval_share > 0
    ):
        held_out = load_preference_data(EMBEDDED, "test")
    elif arguments.eval_share > 0:
        rows, held_out = hold_out(rows, arguments.eval_share)
    # The limit applies to both, so that a small run does not spend its time on measuring.
    rows, held_out = rows[: arguments.limit], held_out[: arguments.limit]
    if not rows:
        raise UserError(
            f"--eval-share: expected a share that leaves pairs for training, got "
            f"{arguments.eval_share:g} of {len(held_out)} pairs"
        )
    _check_objectives(arguments, [*rows, *held_out])
    return list(rows), list(rows), list(held_out)


def stream(arguments: Namespace) -> tuple[Any, list[dict], list[dict]]:
    """(stream of rows, its first rows, held-out rows). The stream is shuffled within a buffer, in a
    different order in each pass.
    """
    if arguments.max_steps is None:
        raise UserError("--streaming: needs --max-steps, since the number of rows is unknown")
    if arguments.cache_hidden not in (None, "auto", "none"):
        raise UserError(
            f"--cache-hidden: the hidden states of a stream cannot be cached, got "
            f"{arguments.cache_hidden!r}; leave out --cache-hidden or --streaming"
        )
    embedded = arguments.data == EMBEDDED
    source = embedded_pairs_path(arguments.split or "train") if embedded else arguments.data
    with argument("--data"):
        rows = stream_of("stream", source, None if embedded else arguments.split)
        if arguments.limit is not None:
            rows = rows.take(arguments.limit)
        first = list(preference_rows(list(rows.take(_SHOWN)), "stream"))
    held_out: Any = []
    if arguments.eval_data is not None:
        with argument("--eval-data"):
            held_out = load_preference_data(arguments.eval_data)
    elif embedded and arguments.split in (None, "train") and arguments.eval_share > 0:
        held_out = load_preference_data(EMBEDDED, "test")
    held_out = list(held_out[: arguments.limit])
    _check_objectives(arguments, [*first, *held_out])
    seed = 0 if arguments.seed is None else arguments.seed
    return rows.shuffle(seed=seed, buffer_size=_SHUFFLED), first, held_out


def _check_objectives(arguments: Namespace, rows: list[dict]) -> None:
    highest = max(row.get("objective", 0) for row in rows)
    if highest >= arguments.num_objectives:
        raise UserError(
            f"--num-objectives: expected at least {highest + 1}, since the data have pairs of "
            f"objective {highest}, got {arguments.num_objectives}"
        )


def hold_out(rows: PreferenceData, share: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Split rows into (training rows, held-out rows), about ``share`` of them held out. All rows of
    a prompt are on the same side.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    held_out: list[dict] = []
    wanted = max(1, round(share * len(rows)))
    chosen = set()
    for prompt in order:
        if len(held_out) >= wanted:
            break
        held_out += groups[prompt]
        chosen.add(prompt)
    return [row for row in rows if json.dumps(row["prompt"]) not in chosen], held_out
