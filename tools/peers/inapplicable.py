# SPDX-License-Identifier: Apache-2.0
"""Tests of other libraries that cannot apply to a gated model, each with its reason."""

from __future__ import annotations

import re

# (pattern of the test's id, why)
INAPPLICABLE: list[tuple[str, str]] = [
    (
        r"test_transformers.*test_generation_tester_mixin_inheritance",
        "it asks for the generation tests, which the source archive lacks",
    ),
    (
        r"test_transformers.*Gated.*test_can_init_all_missing_weights",
        "heads are made by from_backbone or read from their folder, never by _init_weights",
    ),
    (
        r"test_peft.*PrefixTuning|test_peft.*prefix_tuning",
        "prefix tuning fills the cache with keys that no token has, so the gate has none for them; "
        "it is refused by name",
    ),
    (
        r"test_peft.*(prompt_tuning_text|prompt_learning_with_gradient_checkpointing|trust_remote)",
        "it loads a tokenizer or data from a hub",
    ),
    (
        r"test_cut_cross_entropy.*torch_compile",
        "it is cut cross-entropy's own second implementation",
    ),
    (
        r"test_cut_cross_entropy.*test_loss_backward.*-none-",
        "the gated loss has gradients of means over tokens or sequences, not of each token's loss",
    ),
    (
        r"test_liger.*(token_accuracy|predicted_tokens|token_scaling|structured_output)",
        "the gated loss neither scales tokens nor returns predicted ones",
    ),
    (
        r"test_liger.*reduction_none",
        "the gated loss has gradients of means over tokens or sequences, not of each token's loss",
    ),
    (
        r"test_liger.*cross_entropy_correctness.*(_functional|0\.0001)",
        "class weights, label smoothing and the z-loss of a plain cross-entropy are not in the "
        "gated loss",
    ),
]


def reason_of(test: str) -> str | None:
    """Why a test cannot apply; None if it can."""
    return next((why for pattern, why in INAPPLICABLE if re.search(pattern, test)), None)
