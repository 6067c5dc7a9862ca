# SPDX-License-Identifier: Apache-2.0
"""Token selection in plain PyTorch: noise, filters, and the race between the tokens that pass them;
a part of `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PHILOX_ROUNDS = 10
_MASK32 = 0xFFFFFFFF


def philox_uniform(seeds: Tensor, draws: Tensor, vocab_size: int) -> Tensor:
    """A uniform number in (0, 1) for each row and vocabulary entry: a pure function of (seed, draw,
    index).

    Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (v div 4, 0, draw low, draw
    high), word v mod 4; ``(word + 0.5) 2^-32`` in fp32, at most 1 - 2^-24. seeds, draws (B,) int64
    -> (B, V) fp32.
    """
    blocks = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=seeds.device)
    low, high = (lambda x: x & _MASK32), (lambda x: (x >> 32) & _MASK32)
    c0 = blocks.expand(seeds.shape[0], -1)
    c1 = torch.zeros_like(c0)
    c2, c3 = low(draws)[:, None].expand_as(c0), high(draws)[:, None].expand_as(c0)
    k0, k1 = low(seeds)[:, None], high(seeds)[:, None]
    for _ in range(_PHILOX_ROUNDS):
        # int64 products wrap, but both 32-bit halves stay correct.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high(p1) ^ c1 ^ k0, low(p1), high(p0) ^ c3 ^ k1, low(p0)
        k0, k1 = low(k0 + 0x9E3779B9), low(k1 + 0xBB67AE85)
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :vocab_size]
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def keep_mask(
    scaled: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """The tokens that pass the filters: top-k, then top-p on the renormalised rest, then min-p
    (Hugging Face's order).

    Tokens are ranked by (value descending, index ascending), so among equal values at a cut the
    lowest indices are kept. top-p keeps a token if the probability ranked above it is < top_p;
    min-p keeps it if p >= min_p * p_max. The most probable token always passes.

    scaled (B, V): logits / temperature; top_k int32, top_p, min_p fp32 (B,). None, top_k <= 0,
    top_p >= 1 and min_p <= 0 are off. Returns bool (B, V).
    """
    ranked, order = torch.sort(scaled.double(), dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device).expand_as(order)
    everything = torch.ones_like(rank, dtype=torch.bool)
    within_k = within_p = within_min = everything
    if top_k is not None:
        within_k = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    if top_p is not None:
        p = torch.softmax(ranked.masked_fill(~within_k, -torch.inf), dim=-1)
        mass_above = torch.cumsum(p, dim=-1) - p
        within_p = (mass_above < top_p[:, None].double()) | (top_p[:, None] >= 1)
    if min_p is not None:
        relative = torch.exp(ranked - ranked[:, :1])  # p / p_max
        within_min = (relative >= min_p[:, None].double()) | (min_p[:, None] <= 0)
    kept = (within_k & within_p & within_min) | (rank == 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def sample_token(
    logits: Tensor,
    seeds: Tensor,
    draws: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Sample a token per row from softmax(logits / temperature) after the filters, by the
    exponential race ``argmax_v x_v - log E_v``, ``E_v = -log(1 - uniform_v)``. It is exact for any
    filter; ties go to the lowest index. A row with temperature 0 takes the argmax.

    logits (B, V); all others (B,). Returns (B,) int64.
    """
    if temperature is None:
        temperature = torch.ones(logits.shape[0], device=logits.device)
    greedy = ~(temperature > 0)[:, None]
    x = logits / torch.where(greedy, 1.0, temperature[:, None])
    waiting_time = -torch.log1p(-philox_uniform(seeds, draws, logits.shape[-1]))
    race = x - torch.log(waiting_time)
    race = torch.where(keep_mask(x, top_k, top_p, min_p), race, -torch.inf)
    return torch.argmax(torch.where(greedy, logits, race), dim=-1)
