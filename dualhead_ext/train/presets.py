# SPDX-License-Identifier: Apache-2.0
"""Presets: the reward head and its training options, by name. Plain data; imports Python only."""

from __future__ import annotations

from typing import Any

from ..config import DEFAULT_HEAD, head_fields

# name -> {"head": fields of DualHeadConfig, "training": fields of DualHeadTrainingArguments}.
# Options that are given override the preset.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Token rewards in the span of the LM head, calibrated afterwards. Small heads on cached hidden
    # states: a large learning rate and many epochs. With this reward_l2 the pairs are barely fitted
    # by their sigmoid: the head points where a nat of KL buys most, and does not memorise them.
    "default": {
        "head": DEFAULT_HEAD,
        "training": {
            "preference": "token_reward",
            "pref_gate": 1,
            "beta_r": 1.0,
            "reward_l2": 25.0,
            "lambda_g": 0.0,
            "gate_regularizer": "none",
            "lm_on_chosen": False,
            "learning_rate": 3e-3,
            "num_train_epochs": 10.0,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "calibrate": True,
        },
    },
    # The paper's head and objective, as printed except for the regulariser's sign.
    "paper": {
        "head": {"reward_head": "full", "gate": "attention"},
        "training": {
            "preference": "log_prob",
            "pref_gate": 0,
            "beta_r": 0.1,
            "reward_l2": 0.0,
            "lambda_g": 0.01,
            "gate_regularizer": "entropy",
            "lm_on_chosen": True,
            "learning_rate": 5e-5,
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 8,
            "calibrate": False,
        },
    },
}
PRESET_NAMES = tuple(PRESETS)


def head_of(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The `DualHeadConfig` fields of a preset, overridden by ``given``."""
    return head_fields(given, PRESETS[preset]["head"])
