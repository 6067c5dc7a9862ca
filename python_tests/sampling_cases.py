# SPDX-License-Identifier: Apache-2.0
"""Rows of logits, filters, and a test whether tokens follow a distribution."""

from __future__ import annotations

import math

import torch
from decode_cases import make_case


def case_of_logits(logits: torch.Tensor, seed: int, **options) -> dict:
    """A step with exactly these logits: (B, V), or (V,) for all of ``rows`` requests."""
    B = options.pop("rows", None) or logits.shape[0]
    V = logits.shape[-1]
    case = make_case(seed, B, 1, V, gate="logit", sample=True, alpha=torch.zeros(B))
    if logits.dim() == 1:
        case |= {"hidden": torch.ones(B, 1), "lm_weight": logits[:, None].clone()}
    else:  # one request per hidden dimension
        case |= {"hidden": torch.eye(B), "lm_weight": logits.T.contiguous()}
    case["reward_weight"] = case["lm_weight"][None]
    filters = {"temperature": torch.float32, "top_p": torch.float32, "min_p": torch.float32}
    for name, dtype in (filters | {"top_k": torch.int32}).items():
        if name in options:
            value = options.pop(name)
            case[name] = torch.as_tensor(value, dtype=dtype).expand(B)
    return case | options


def filtered_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """float64 probabilities after the filters, in Hugging Face's order, from a full sort."""
    x = logits.double() / temperature
    order = sorted(range(len(x)), key=lambda v: (-x[v].item(), v))
    if top_k > 0:
        order = order[:top_k]
    p = torch.softmax(x[order], 0)
    order = [v for v, above in zip(order, (p.cumsum(0) - p).tolist(), strict=True) if above < top_p]
    p = torch.softmax(x[order], 0)
    order = [v for v, q in zip(order, p.tolist(), strict=True) if q >= min_p * p[0].item()]
    full = torch.zeros(len(x), dtype=torch.float64)
    full[order] = torch.softmax(x[order], 0)
    return full


def assert_distribution(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square test at p = 5e-7 (approximation of Wilson and Hilferty). No other tokens occur."""
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    mean = expected * len(tokens)
    common = mean >= 10
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    mean = torch.cat((mean[common], mean[~common].sum()[None]))
    observed, mean = observed[mean > 0], mean[mean > 0]
    statistic = ((observed - mean) ** 2 / mean).sum().item()
    k = max(len(mean) - 1, 1)
    limit = k * (1 - 2 / (9 * k) + 4.9 * math.sqrt(2 / (9 * k))) ** 3
    assert statistic < limit, (statistic, limit)


FILTERS = {
    "none": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 5},
    "top_k beyond V": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.85, "min_p": 0.05},
}
