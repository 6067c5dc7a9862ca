# SPDX-License-Identifier: Apache-2.0
"""Token selection from logits that were computed in eager PyTorch: those of a prompt, and those of
some mixtures. It draws the same tokens as the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Values of the operator's status of a row.
STATUS_NON_FINITE, STATUS_CACHE_FULL = 1, 2

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
) -> Tensor | None:
    """The tokens that pass the filters, (B, V) bool; None if all do. Computed in float64, and
    sorted only for top-k and top-p.

    The filters apply in the order of the arguments, as in Hugging Face. Among equal values at a cut
    the lowest indices are kept. The most probable token always passes.

    Args:
        scaled: (B, V), logits / temperature.
        top_k: (B,) int32; <= 0 is off.
        top_p: (B,); >= 1 is off.
        min_p: (B,); <= 0 is off.
    """
    keep, values = None, scaled.double()
    if top_k is not None or top_p is not None:
        ranked, order = torch.sort(values, dim=-1, descending=True, stable=True)
        rank = torch.arange(scaled.shape[-1], device=scaled.device).expand_as(order)
        keep = torch.ones_like(rank, dtype=torch.bool)
        if top_k is not None:
            keep = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
        if top_p is not None:
            p = torch.softmax(ranked.masked_fill(~keep, -torch.inf), dim=-1)
            above = torch.cumsum(p, dim=-1) - p
            keep = keep & ((above < top_p[:, None].double()) | (top_p[:, None] >= 1))
        keep = torch.zeros_like(keep).scatter(-1, order, keep | (rank == 0))
    if min_p is not None:
        # The most probable token passes the other filters, so the order does not matter.
        threshold = values.amax(-1, keepdim=True) + torch.log(min_p[:, None].double())
        likely = (values >= threshold) | (min_p[:, None] <= 0)
        keep = likely if keep is None else keep & likely
    return keep


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
    greedy = torch.argmax(logits, dim=-1)
    scaled = logits
    if temperature is not None:
        scaled = (
            logits
            / torch.where(temperature > 0, temperature, torch.ones_like(temperature))[:, None]
        )
    noise = -torch.log(-torch.log1p(-philox_uniform(seeds, draws, logits.shape[-1])))
    raced, keep = scaled + noise, keep_mask(scaled, top_k, top_p, min_p)
    if keep is not None:
        raced = raced.masked_fill(~keep, -torch.inf)
    token = torch.argmax(raced, dim=-1)
    return token if temperature is None else torch.where(temperature > 0, token, greedy)


def choose_token(
    logits: Tensor, draw: dict[str, Tensor | None], failed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens from logits (B, V) as a decode step does: (token (B,) int64, its
    log-probability (B,), whether the row failed (B,)). A row that is not finite fails: token 0,
    log-probability NaN.

    draw: arguments of :func:`sample_token`; without seeds greedy. The caller advances ``draws``.
    failed: (B,), rows known to be not finite.
    """
    lse = torch.logsumexp(logits, dim=-1)
    not_finite = ~torch.isfinite(lse)
    failed = not_finite if failed is None else failed | not_finite
    usable = logits.masked_fill(failed[:, None], 0.0)
    if draw.get("seeds") is None:
        token = torch.argmax(usable, dim=-1)
    else:
        token = sample_token(usable, **draw)
    token = token.masked_fill(failed, 0)
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - lse
    return token, logprob.masked_fill(failed, torch.nan), failed
