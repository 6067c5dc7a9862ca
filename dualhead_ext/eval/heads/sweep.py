# SPDX-License-Identifier: Apache-2.0
"""Replies to the same prompts at several strengths: their distance from the backbone and their
scores.

Everything is sampled at temperature 1. A prompt's replies use the same random numbers at each
strength, so two replies are equal up to where their distributions differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from ..judging import bootstrap
from ..likelihood import Text, perplexity, token_mean
from ..sampling import Message, RowNoise, batches, encode_prompts, prompt_text, response, row_seed
from ..scorers import Scorer
from ..text import words
from .states import Done, Heads, nobody, picked

Prompt = str | list[Message]


@dataclass(frozen=True)
class Reply:
    """One sampled reply.

    Attributes:
        text: the text, without special tokens.
        ended: True if the model ended its turn, False if the reply was cut off.
        tokens: the tokens of the prompt and of the reply with its end token.
    """

    text: str
    ended: bool
    tokens: Text


def sample_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    strengths: Sequence[float],
    max_new_tokens: int = 64,
    seed: int = 0,
    objective_weights: Sequence[float] | None = None,
    batch_size: int = 32,
    done: Done = nobody,
) -> list[list[Reply]]:
    """For each prompt, one reply at each strength. Samples about ``batch_size`` replies at once and
    calls ``done`` with the number of prompts after each batch.
    """
    found: list[list[Reply]] = []
    for part in batches(prompts, max(1, batch_size // len(strengths))):
        texts = [prompt_text(prompt, tokenizer) for prompt in part]
        found += _batch(model, tokenizer, texts, strengths, max_new_tokens, seed, objective_weights)
        done(len(part))
    return found


@torch.no_grad()
def _batch(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    strengths: Sequence[float],
    max_new_tokens: int,
    seed: int,
    objective_weights: Sequence[float] | None,
) -> list[list[Reply]]:
    ids, mask = (x.to(model.device) for x in encode_prompts(texts, tokenizer))
    count, pad = len(strengths), tokenizer.pad_token_id
    seeds = [row_seed(seed, text, 0) for text in texts for _ in strengths]
    controls = {"strength": torch.tensor(list(strengths) * len(texts), device=model.device)}
    if objective_weights is not None:
        controls["objective_weights"] = torch.tensor(objective_weights, device=model.device)
    out = model.generate(
        input_ids=ids.repeat_interleave(count, 0),
        attention_mask=mask.repeat_interleave(count, 0),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([RowNoise(seeds, 1.0, model.device)]),
        pad_token_id=pad if pad is not None else 0,
        **controls,
    )
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    rows = out[:, ids.shape[1] :].tolist()
    asked = [row[own.bool()].tolist() for row, own in zip(ids, mask, strict=True)]
    replies = [_reply(asked[i // count], row, tokenizer, ends) for i, row in enumerate(rows)]
    return list(batches(replies, count))


def _reply(prompt: list[int], new: list[int], tokenizer: Any, ends: Sequence[int]) -> Reply:
    end = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    found = response(new, tokenizer, ends)
    tokens = Text([*prompt, *new[:end]], [0] * len(prompt) + [1] * end)
    return Reply(found.text, found.ended, tokens)


def sweep_figures(
    model: Any,
    prompts: Sequence[Prompt],
    strengths: Sequence[float],
    replies: Sequence[Sequence[Reply]],
    scorers: Sequence[Scorer] = (),
    objective_weights: Sequence[float] | None = None,
    batch_size: int = 8,
    done: Done = nobody,
) -> list[dict[str, Any]]:
    """One dict per strength. Figures with an interval are [value, low, high], by a bootstrap over
    prompts:

    ``strength``; ``kl`` from the backbone, nats per token; ``perplexity`` under the backbone;
    ``alpha``: mean, min and max over the tokens; ``words`` per reply; ``ended``, the share of
    replies that the model ended; ``scores``: scorer -> mean score; ``gains``: scorer -> mean change
    from the first strength over the same prompts. ``done`` gets the number of replies after each
    batch.
    """
    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    scored = {
        found.name: [
            found.checked(question, [reply.text for reply in row])
            for question, row in zip(questions, replies, strict=True)
        ]
        for found in scorers
    }
    heads = Heads(model, objective_weights)
    rows = []
    for i, strength in enumerate(strengths):
        own = [row[i] for row in replies]
        tokens = _token_figures(heads, [reply.tokens for reply in own], strength, batch_size, done)
        kl, log_probs, alpha = ([values[:, j] for values in tokens] for j in range(3))
        every_alpha = torch.cat(alpha)
        rows.append(
            {
                "strength": strength,
                "kl": list(token_mean(kl)),
                "perplexity": list(perplexity(log_probs)),
                "alpha": {
                    "mean": float(every_alpha.mean()),
                    "min": float(every_alpha.min()),
                    "max": float(every_alpha.max()),
                },
                "words": _mean([len(words(reply.text)) for reply in own]),
                "ended": sum(reply.ended for reply in own) / len(own),
                "scores": {n: _mean([v[i] for v in found]) for n, found in scored.items()},
                "gains": {n: _mean([v[i] - v[0] for v in found]) for n, found in scored.items()},
            }
        )
    return rows


def _token_figures(
    heads: Heads, texts: Sequence[Text], strength: float, batch_size: int, done: Done
) -> list[Tensor]:
    """KL from the backbone, the backbone's log-probability, and alpha of each token."""

    def figures(hidden: Tensor, gate_logit: Tensor, tokens: Tensor) -> Tensor:
        z_lm, z_rm = heads.logits(hidden)
        alpha = heads.alpha(gate_logit, strength)
        p = heads.log_probs(z_lm, z_rm, alpha)
        q = heads.log_probs(z_lm, z_rm, torch.zeros_like(alpha))
        # Tokens of probability 0 contribute nothing: 0 log 0 = 0.
        kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0.0)
        return torch.stack((kl, picked(q, tokens), alpha.double()), -1)

    return heads.read(texts, figures, batch_size, done)


def _mean(values: Sequence[float]) -> list[float]:
    return list(bootstrap(values, lambda rows: sum(rows) / len(rows)))
