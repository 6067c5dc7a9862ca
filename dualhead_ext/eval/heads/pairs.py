# SPDX-License-Identifier: Apache-2.0
"""How often trained heads, their backbone and the rule "the longer one" prefer the better response
of a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data import score_pairs
from ...data.collate import encode
from ..judging import bootstrap
from ..likelihood import Text
from ..metrics import text_length, wilson_interval
from .states import Done, Heads, nobody, picked

# Names of the rankers of responses, in the order of the columns of `_scores`.
REWARD, MIXTURE, BACKBONE, LONGER = "reward head", "mixture", "backbone", "the longer one"
# The reward head's score of a response, by the heads' `preference`.
REWARDS = {
    "token_reward": "sum of alpha delta over its tokens",
    "log_prob": "log-probability under the reward head",
}


def pair_figures(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    max_length: int = 512,
    batch_size: int = 8,
    done: Done = nobody,
) -> dict[str, Any]:
    """Accuracy of each ranker with a 95 % interval; a tie counts as half a success.

    `REWARD` ranks responses by the score it was trained for (`REWARDS`), `MIXTURE` at strength 1
    and `BACKBONE` by log-probability, `LONGER` by characters.

    Args:
        rows: pairs or ranked lists, as from :func:`dualhead_ext.data.load_preference_data`. A
            row's objective selects the reward head.
        done: called with the number of texts after each batch.
    Returns:
        ``rows``, ``pairs``, ``interval`` ("Wilson" for pairs; "bootstrap over rows" for ranked
        lists, whose pairs share texts), ``reward`` and ``accuracy``: name -> [value, low, high].
    """
    responses = [_responses(row) for row in rows]
    texts = [
        [_text(row["prompt"], text, ended, tokenizer, max_length) for text, ended in found]
        for row, found in zip(rows, responses, strict=True)
    ]
    scores: list[list[tuple[float, ...]]] = [[] for _ in rows]
    for objective in sorted({row.get("objective", 0) for row in rows}):
        own = [i for i, row in enumerate(rows) if row.get("objective", 0) == objective]
        flat = iter(_scores(model, [t for i in own for t in texts[i]], objective, batch_size, done))
        for i in own:
            lengths = (float(text_length(text)) for text, _ in responses[i])
            scores[i] = [(*next(flat), length) for length in lengths]
    wins = [_wins(row, found) for row, found in zip(rows, scores, strict=True)]
    ranked = "scores" in rows[0]
    names = (REWARD, MIXTURE, BACKBONE, LONGER)
    return {
        "rows": len(rows),
        "pairs": sum(count for _, count in wins),
        "interval": "bootstrap over rows" if ranked else "Wilson",
        "reward": REWARDS[model.dual_head_config.preference],
        "accuracy": {
            name: _share([(won[i], count) for won, count in wins], ranked)
            for i, name in enumerate(names)
        },
    }


def _responses(row: dict[str, Any]) -> list[tuple[Any, bool]]:
    """(text, whether the model ended its turn) for each response."""
    if "scores" not in row:
        return [(row["chosen"], True), (row["rejected"], True)]
    ended = row.get("ended") or [True] * len(row["responses"])
    return list(zip(row["responses"], ended, strict=True))


def _text(prompt: Any, response: Any, ended: bool, tokenizer: Any, max_length: int) -> Text:
    coded = encode(prompt, response, tokenizer, max_length, ended)
    return Text(coded["input_ids"], coded["completion_mask"])


def _scores(
    model: Any, texts: Sequence[Text], objective: int, batch_size: int, done: Done
) -> Iterable[tuple[float, float, float]]:
    """The scores of each text by the reward head, the mixture and the backbone."""
    config = model.dual_head_config
    heads = Heads(model, torch.eye(config.num_objectives)[objective].tolist())
    rewards = config.preference == "token_reward"

    def figures(hidden: Tensor, gate_logit: Tensor, tokens: Tensor) -> Tensor:
        z_lm, z_rm = heads.logits(hidden)
        alpha = heads.alpha(gate_logit)
        if rewards:
            reward = alpha * (picked(z_rm, tokens) - picked(z_lm, tokens))
        else:
            reward = picked(heads.log_probs(z_lm, z_rm, torch.ones_like(alpha)), tokens)
        mixture = picked(heads.log_probs(z_lm, z_rm, alpha), tokens)
        backbone = picked(heads.log_probs(z_lm, z_rm, torch.zeros_like(alpha)), tokens)
        return torch.stack((reward.double(), mixture, backbone), -1)

    found = heads.read(texts, figures, batch_size, done)
    return [tuple(values.sum(0).tolist()) for values in found]


def _wins(row: dict[str, Any], scores: Sequence[tuple[float, ...]]) -> tuple[list[float], int]:
    """(successes by each score, pairs) of a row."""
    pairs = score_pairs(row["scores"]) if "scores" in row else [(0, 1)]
    columns = zip(*scores, strict=True)
    wins = [sum((c[a] > c[b]) + 0.5 * (c[a] == c[b]) for a, b in pairs) for c in columns]
    return wins, len(pairs)


def _share(wins: Sequence[tuple[float, int]], ranked: bool) -> list[float]:
    if ranked:
        return list(bootstrap(wins, _pooled))
    successes, pairs = sum(won for won, _ in wins), sum(count for _, count in wins)
    return [successes / pairs, *wilson_interval(successes, pairs)]


def _pooled(wins: Sequence[tuple[float, int]]) -> float:
    return sum(won for won, _ in wins) / sum(count for _, count in wins)
