# SPDX-License-Identifier: Apache-2.0
"""Named recipes: what a head is and how it is trained. Plain data; needs nothing but Python."""

from __future__ import annotations

from typing import Any

from ..config import DEFAULT_HEAD, head_fields

# name -> "head": fields of DualHeadConfig, "training": of DualHeadTrainingArguments. Whatever is
# given beside a preset stands over it.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # A reward of each token in the LM head's own space, its strength measured afterwards. Small
    # heads on cached hidden states: large steps, many times through the data.
    "default": {
        "head": DEFAULT_HEAD,
        "training": {
            "preference": "token_reward",
            "pref_gate": 1,
            "beta_r": 1.0,
            "lambda_g": 0.0,
            "gate_regularizer": "none",
            "lm_on_chosen": False,
            "learning_rate": 1e-2,
            "num_train_epochs": 10.0,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "calibrate": True,
        },
    },
    # The paper's head and objective, as printed but for the regulariser's sign.
    "paper": {
        "head": {"reward_head": "full", "gate": "attention"},
        "training": {
            "preference": "log_prob",
            "pref_gate": 0,
            "beta_r": 0.1,
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
    """The fields of `DualHeadConfig` of a preset, under what is given."""
    return head_fields(given, PRESETS[preset]["head"])
