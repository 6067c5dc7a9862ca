# SPDX-License-Identifier: Apache-2.0
"""Tests of neighbours that cannot apply to a gated model, each with its reason."""

from __future__ import annotations

import re

# (pattern of the test's id, why)
INAPPLICABLE: list[tuple[str, str]] = [
    (
        r"test_cut_cross_entropy.*torch_compile",
        "it is cut cross-entropy's own second implementation",
    ),
    (
        r"test_cut_cross_entropy.*test_loss_backward.*-none-",
        "the gated loss has gradients of means over tokens or sequences, not of each token's loss",
    ),
]


def reason_of(test: str) -> str | None:
    """Why a test cannot apply; None: it does."""
    return next((why for pattern, why in INAPPLICABLE if re.search(pattern, test)), None)
