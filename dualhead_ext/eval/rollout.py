# SPDX-License-Identifier: Apache-2.0
"""Sampling from a policy that changes the backbone's logits, with each token's distance from the
backbone.

The backbone's cache of a prompt is computed once for all policies and strengths. Each row has its
own random number generator, which makes the runs of two policies comparable: where their
distributions agree, so do the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..model.hf_cache import GENERATION_CACHE
from .sampling import RowNoise, encode_prompts, row_seed

# Noise larger than this many bytes is not kept: each rollout draws it again.
_KEPT_NOISE = 1 << 29


class SharedNoise:
    """The random numbers of a batch. Those of the last seed are kept for the next policy, which
    draws the same numbers.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._seed: int | None = None

    def steps(self, seed: int, like: Tensor, count: int) -> Iterator[Tensor]:
        """The noise of each of ``count`` steps, as :meth:`RowNoise.draw` returns for ``like``."""
        if seed != self._seed:
            self._seed, self._kept, self._source = seed, [], self._fresh(seed, like)
        if like.numel() * 4 * count > _KEPT_NOISE:
            source = self._fresh(seed, like)
            for _ in range(count):
                yield source.draw(like)
            return
        for step in range(count):
            if step == len(self._kept):
                self._kept.append(self._source.draw(like))
            yield self._kept[step]

    def _fresh(self, seed: int, like: Tensor) -> RowNoise:
        return RowNoise([row_seed(seed, text, 0) for text in self._texts], 1.0, like.device)


@dataclass(frozen=True)
class Prefix:
    """The backbone's state after a batch of prompts.

    Attributes:
        texts: the prompts, as the model reads them.
        ids, mask: (B, T), padded on the left.
        hidden: (B, T, d), hidden states that the LM head reads.
        cache: the cache of all T tokens.
        noise: random numbers for sampling responses.
    """

    texts: Sequence[str]
    ids: Tensor
    mask: Tensor
    hidden: Tensor
    cache: DynamicCache
    noise: SharedNoise = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", SharedNoise(self.texts))


class Policy(Protocol):
    """Maps the backbone's logits to other logits."""

    def begin(self, prefix: Prefix, new_tokens: int) -> None:
        """Read the prompts; at most ``new_tokens`` tokens will follow."""

    def __call__(
        self, token: Tensor | None, hidden: Tensor, z_lm: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(token (B,), the last sampled one, None at first; hidden (B, d); z_LM (B, V); mask (B, T)
        of the text so far) -> logits (B, V), alpha (B,) or None.
        """


class Backbone:
    """The policy that changes nothing."""

    def begin(self, prefix: Prefix, new_tokens: int) -> None:
        pass

    def __call__(
        self, token: Tensor | None, hidden: Tensor, z_lm: Tensor, mask: Tensor
    ) -> tuple[Tensor, None]:
        return z_lm, None


@dataclass(frozen=True)
class Rollout:
    """Sampled responses.

    Attributes:
        tokens: (B, N) ids.
        written: (B, N) bool, True up to and including the end token.
        kl: (B, N) fp32, KL(policy || backbone) at each position, nats.
        logprob: (B, N) fp32, log-probability of the token under the backbone.
        alpha: (B, N) fp32, or None.
    """

    tokens: Tensor
    written: Tensor
    kl: Tensor
    logprob: Tensor
    alpha: Tensor | None

    def mean(self, name: str) -> float:
        """Mean of the field ``kl``, ``logprob`` or ``alpha`` over the written tokens."""
        return float(getattr(self, name)[self.written].double().mean())


def read_prompts(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Prefix:
    """Run the backbone on a batch of prompts."""
    ids, mask = (x.to(model.device) for x in encode_prompts(texts, tokenizer))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        hidden = decode_step(model, ids, mask, cache)
    return Prefix(tuple(texts), ids, mask, hidden, cache)


def decode_step(model: nn.Module, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Run the decoder on ids (B, n), the last n columns of ``mask`` (B, T), and extend the cache.

    Returns the hidden states (B, n, d).
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model.get_decoder()(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **{GENERATION_CACHE: cache},
        use_cache=True,
    )[0]


@torch.inference_mode()
def roll_out(
    model: nn.Module,
    prefix: Prefix,
    policy: Policy,
    new_tokens: int,
    seed: int,
    ends: Sequence[int],
) -> Rollout:
    """Sample a response to each prompt at temperature 1.

    Args:
        model: the backbone, a plain causal language model.
        policy: changes the backbone's logits.
        new_tokens: longer responses are cut off.
        seed: determines a row's random numbers, together with the prompt's text.
        ends: the end tokens.
    """
    cache, mask = copy.deepcopy(prefix.cache), prefix.mask
    ends = torch.tensor(list(ends), device=mask.device, dtype=torch.int64)
    policy.begin(prefix, new_tokens)
    hidden, token = prefix.hidden[:, -1], None
    alive = torch.ones(len(prefix.texts), dtype=torch.bool, device=mask.device)
    columns: list[tuple[Tensor, ...]] = []
    z_lm = model.get_output_embeddings()(hidden).float()
    for step, noise in enumerate(prefix.noise.steps(seed, z_lm, new_tokens)):
        if step:
            z_lm = model.get_output_embeddings()(hidden).float()
        logits, alpha = policy(token, hidden, z_lm, mask)
        # A few rows at a time stay in the processor's cache.
        parts = zip(logits.float().split(_ROWS), z_lm.split(_ROWS), noise.split(_ROWS), strict=True)
        drawn = [_draw(*part) for part in parts]
        token, kl, logprob = (torch.cat(column) for column in zip(*drawn, strict=True))
        columns.append((token, alive, kl, logprob, *(() if alpha is None else (alpha.float(),))))
        alive = alive & ~torch.isin(token, ends)
        if step + 1 == new_tokens or not bool(alive.any()):
            break
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        hidden = decode_step(model, token[:, None], mask, cache)[:, -1]
    tokens, written, kl, logprob, *rest = (torch.stack(c, 1) for c in zip(*columns, strict=True))
    return Rollout(tokens, written, kl, logprob, rest[0] if rest else None)


_ROWS = 4


def _draw(logits: Tensor, z_lm: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, KL from the backbone, log-probability under it), each (B,)."""
    p, q = logits.log_softmax(-1), z_lm.log_softmax(-1)
    token = (p - noise).argmax(-1)
    # Tokens of probability 0 contribute nothing: 0 log 0 = 0.
    kl = (p.exp() * (p - q).nan_to_num_(neginf=0.0)).sum(-1).clamp_(min=0.0)
    return token, kl, q.gather(-1, token[:, None])[:, 0]


@torch.inference_mode()
def response_logprobs(
    model: nn.Module,
    tokenizer: Any,
    prefix: Prefix,
    responses: Sequence[str],
    ended: Sequence[bool],
) -> tuple[float, int]:
    """(sum of log-probabilities under the backbone, number of tokens) of given responses.

    Args:
        ended: for each response, whether its end token counts too.
    """
    end = [tokenizer.eos_token_id]
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + (end if done else [])
        for text, done in zip(responses, ended, strict=True)
    ]
    width = max(1, *map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    own = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    mask = torch.cat((prefix.mask, own.to(prefix.mask)), 1)
    hidden = decode_step(model, ids, mask, copy.deepcopy(prefix.cache))
    total, head = 0.0, model.get_output_embeddings()
    for row, count in enumerate(map(len, rows)):
        states = torch.cat((prefix.hidden[row, -1:], hidden[row, : max(count - 1, 0)]))[:count]
        logprobs = head(states).float().log_softmax(-1)
        total += float(logprobs.gather(1, ids[row, :count, None]).double().sum())
    return total, sum(map(len, rows))
