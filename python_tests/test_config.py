# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from dualhead_ext.config import DualHeadConfig

GOOD = {"hidden_size": 8, "vocab_size": 11}


def test_round_trip():
    config = DualHeadConfig(**GOOD, gate="fixed", gate_alpha=0.25, mix="probs", num_objectives=3)
    assert DualHeadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.gate_size == 384


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"vocab_size": 3.0}, TypeError, "vocab_size must be an int, got 3.0"),
        ({"num_objectives": True}, TypeError, "num_objectives must be an int"),
        ({"gate": "mlp"}, ValueError, "gate must be one of attention, fixed, linear, got 'mlp'"),
        ({"mix": "both"}, ValueError, "mix must be one of logits, probs, got 'both'"),
        ({"gate_alpha": 1.5}, ValueError, r"gate_alpha must be in \[0, 1\], got 1.5"),
        ({"gate_alpha": float("nan")}, ValueError, "gate_alpha must be finite"),
        ({"gate_alpha": 10**400}, ValueError, "gate_alpha must be finite"),
        ({"kl_curve": [[0.0, 0.0], [1.0, 10**400]]}, ValueError, "kl_curve must be pairs"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap must be >= 0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must not be 0"),
        ({"logit_scale": "1"}, TypeError, "logit_scale must be a number"),
        ({"bias": 1}, TypeError, "bias must be a bool"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        DualHeadConfig(**GOOD | change)


def test_from_dict_refuses_keys_it_does_not_know():
    with pytest.raises(ValueError, match="unknown keys colour"):
        DualHeadConfig.from_dict(GOOD | {"colour": 1})
    with pytest.raises(ValueError, match="missing keys vocab_size"):
        DualHeadConfig.from_dict({"hidden_size": 8})
