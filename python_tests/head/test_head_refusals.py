# SPDX-License-Identifier: Apache-2.0
"""What DualHead refuses, and that a refused call leaves the cache as it was."""

import pytest
import torch
from small_heads import D, make_head

GOOD = torch.zeros(2, 3, D)
BAD_FORWARD = [
    ({"hidden": torch.zeros(2, 3, D + 1)}, ValueError, r"hidden must be \(B, T, 24\)"),
    ({"hidden": torch.zeros(2, D)}, ValueError, r"hidden must be \(B, T, 24\)"),
    ({"hidden": torch.zeros(0, 3, D)}, ValueError, "not empty"),
    ({"hidden": torch.zeros(2, 0, D)}, ValueError, "not empty"),
    ({"hidden": torch.zeros(2, 3, D).double()}, TypeError, "float32, as the LM head"),
    ({"hidden": GOOD.to("meta")}, ValueError, "must be on cpu"),
    ({"hidden": [[0.0] * D]}, TypeError, "must be a tensor"),
    ({"attention_mask": torch.ones(2, 4)}, ValueError, r"must be \(2, 3\), got \(2, 4\)"),
    ({"attention_mask": [[1, 1, 1]] * 2}, TypeError, "attention_mask must be a tensor"),
    ({"strength": -0.5}, ValueError, "strength must be a number >= 0, got -0.5"),
    ({"strength": float("nan")}, ValueError, "strength must be"),
    ({"strength": "1"}, TypeError, "strength must be"),
    ({"strength": torch.ones(3)}, ValueError, r"strength must be \(2,\), got \(3,\)"),
    ({"strength": [1.0]}, ValueError, r"strength must be \(2,\), got \(1,\)"),
    ({"alpha": 1.5}, ValueError, r"alpha must be a number in \[0, 1\], got 1.5"),
    ({"gate_offset": float("inf")}, ValueError, "gate_offset must be"),
    ({"objective_weights": [0.5, 0.5]}, ValueError, r"\(K,\) = \(1,\)"),
    ({"objective_weights": [float("nan")]}, ValueError, "objective_weights must be finite"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_FORWARD)
def test_forward_refuses(change, error, message):
    head = make_head(dtype=torch.float32)
    with pytest.raises(error, match=message):
        head(**{"hidden": GOOD} | change)


BAD_STEP = [
    ({"hidden": torch.zeros(2, 3, D)}, ValueError, r"hidden must be \(B, 24\)"),
    ({"hidden": torch.zeros(3, D)}, ValueError, "cache holds 2 rows, hidden has 3"),
    ({"hidden": torch.zeros(2, D).bfloat16()}, TypeError, "hidden must be torch.float32"),
    ({"cache": None}, TypeError, "cache must be a GateCache"),
    ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature must be"),
    ({"do_sample": True, "top_k": -1}, ValueError, "top_k must be an integer >= 0"),
    ({"do_sample": True, "top_k": 2.5}, ValueError, "top_k must be an integer >= 0"),
    ({"do_sample": True, "top_p": 0.0}, ValueError, "top_p must be"),
    ({"do_sample": True, "top_p": 1.1}, ValueError, "top_p must be"),
    ({"do_sample": True, "min_p": 2.0}, ValueError, "min_p must be"),
    ({"do_sample": True, "seeds": torch.zeros(2)}, TypeError, "seeds must be an int64 tensor"),
    ({"do_sample": True, "seeds": torch.zeros(3).long()}, ValueError, r"seeds must be \(2,\)"),
    ({"strength": -1}, ValueError, "strength must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_STEP)
def test_step_refuses_and_leaves_the_cache(change, error, message):
    head = make_head(dtype=torch.float32)
    cache = head.new_cache(2, 4)
    head.prefill(torch.randn(2, 2, D), cache)
    before = {n: v.clone() for n, v in vars(cache).items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match=message):
        head.step(**{"hidden": torch.zeros(2, D), "cache": cache} | change)
    for name, value in before.items():
        assert torch.equal(getattr(cache, name), value), name
    assert cache.columns == 2


def test_a_full_cache_is_refused_before_anything_is_written():
    head = make_head(dtype=torch.float32)
    cache = head.new_cache(1, 3)
    head.prefill(torch.randn(1, 2, D), cache)
    with pytest.raises(ValueError, match="holds 2 of max_length = 3 columns, 2 more do not fit"):
        head.prefill(torch.randn(1, 2, D), cache)
    head.step(torch.randn(1, D), cache)
    with pytest.raises(ValueError, match="1 more do not fit"):
        head.step(torch.randn(1, D), cache)
    assert cache.columns == 3


BAD_PREFILL = [
    ({"logits_to_keep": 4}, ValueError, r"logits_to_keep must be in 0..3, got 4"),
    ({"logits_to_keep": True}, TypeError, "logits_to_keep must be an int"),
    ({"attention_mask": torch.ones(2, 3)}, ValueError, r"must be \(2, 4\), got \(2, 3\)"),
    ({"alpha": 2.0}, ValueError, "alpha must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PREFILL)
def test_prefill_refuses_and_leaves_the_cache(change, error, message):
    head = make_head(dtype=torch.float32)
    cache = head.new_cache(2, 8)
    head.prefill(torch.randn(2, 1, D), cache)
    with pytest.raises(error, match=message):
        head.prefill(**{"hidden": torch.zeros(2, 3, D), "cache": cache} | change)
    assert cache.columns == 1 and cache.length.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"max_length": 2.0}, TypeError, "max_length must be an int"),
        ({"dtype": torch.float16}, ValueError, "dtype must be the LM head's"),
        ({"device": "meta"}, ValueError, "device must be the LM head's"),
        ({"device": 2**63}, ValueError, "device must be the LM head's"),
        ({"batch_size": 2**63}, ValueError, "batch_size must fit in 64 bits"),
    ],
)
def test_new_cache_refuses(change, error, message):
    with pytest.raises(error, match=message):
        make_head().new_cache(**{"batch_size": 2, "max_length": 4} | change)
