# SPDX-License-Identifier: Apache-2.0
"""Ten million draws of the CUDA step for each filter, against the float64 distribution."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import FILTERS, assert_distribution, case_of_logits, filtered_probabilities

from dualhead_ext import ops

pytestmark = pytest.mark.cuda
ROWS, CALLS = 4096, 2442


@pytest.mark.parametrize("mixture", [False, True], ids=["logits", "probs"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_distribution_of_ten_million_draws(filters, mixture, seed):
    logits = torch.randn(37, generator=torch.Generator().manual_seed(seed)) * 1.5
    case = case_of_logits(logits, seed, rows=ROWS, mix_probs=mixture, **filters)
    case = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    counts = torch.zeros(len(logits), dtype=torch.int64, device="cuda")
    with torch.no_grad():  # the step advances the draw counters itself
        for _ in range(CALLS):
            counts += torch.bincount(ops.decode_step(**case).token, minlength=len(logits))
    assert counts.sum() >= 10**7
    tokens = torch.arange(len(logits)).repeat_interleave(counts.cpu())
    assert_distribution(tokens, filtered_probabilities(logits, **filters))
