# SPDX-License-Identifier: Apache-2.0
"""GateCache as a state machine.

After any sequence of operations, decoding equals a pass without a cache over the same tokens.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heads import D, make_head

HEAD = make_head(dtype=torch.float64)

ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 10**6)),
    st.tuples(st.just("prefill"), st.integers(0, 10**6)),
    st.tuples(st.just("select"), st.integers(0, 10**6)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("crop"), st.integers(0, 10)),
    st.tuples(st.just("reserve"), st.integers(0, 60)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("deepcopy"), st.just(0)),
    st.tuples(st.just("device"), st.just(0)),
)


class Model:
    """The model of a cache: each row's complete hidden states and mask."""

    def __init__(self, batch):
        self.hidden = torch.zeros(batch, 0, D, dtype=torch.float64)
        self.mask = torch.zeros(batch, 0, dtype=torch.long)

    def extend(self, hidden, mask):
        self.hidden, self.mask = (
            torch.cat((self.hidden, hidden), 1),
            torch.cat((self.mask, mask), 1),
        )


def apply(cache, model, action, value):
    generator = torch.Generator().manual_seed(value)
    if action in ("step", "prefill"):
        length = 1 if action == "step" else value % 4 + 1
        hidden = torch.randn(cache.batch_size, length, D, generator=generator, dtype=torch.float64)
        mask = torch.ones(cache.batch_size, length, dtype=torch.long)
        if action == "prefill":
            mask = torch.randint(0, 2, mask.shape, generator=generator)
        model.extend(hidden, mask)
        cache.reserve(model.hidden.shape[1])
        if action == "step":
            got = HEAD.step(hidden[:, 0], cache).alpha[:, None]
        else:
            got = HEAD.prefill(hidden, cache, model.mask, logits_to_keep=0).alpha
        expected = HEAD(model.hidden, model.mask).alpha[:, -length:]
        torch.testing.assert_close(got, expected)
    elif action == "select":
        rows = torch.randint(0, cache.batch_size, (value % 3 + 1,), generator=generator)
        cache.select(rows)
        model.hidden, model.mask = model.hidden[rows], model.mask[rows]
    elif action == "repeat" and cache.batch_size <= 4:
        cache.repeat_interleave(value)
        model.hidden = model.hidden.repeat_interleave(value, 0)
        model.mask = model.mask.repeat_interleave(value, 0)
    elif action == "crop":
        cache.crop(value)
        model.hidden, model.mask = model.hidden[:, :value], model.mask[:, :value]
    elif action == "reserve":
        cache.reserve(value)
    elif action == "reset":
        cache.reset()
        model.hidden, model.mask = model.hidden[:, :0], model.mask[:, :0]
    elif action == "device":
        cache.advanced_on_device()  # as after a compiled step: the host must read the length again
    elif action == "deepcopy":
        cache = copy.deepcopy(cache)
    return cache


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=12))
def test_any_history_equals_a_fresh_pass(actions):
    cache, model = HEAD.new_cache(2, 4), Model(2)
    for action, value in actions:
        cache = apply(cache, model, action, value)
        assert cache.columns == model.hidden.shape[1] and cache.batch_size == len(model.hidden)
        assert cache.length.tolist() == [cache.columns] * cache.batch_size


def test_a_copy_shares_the_weights_and_nothing_else():
    cache = HEAD.new_cache(1, 4)
    twin = copy.deepcopy(cache)
    assert twin.weights is cache.weights
    HEAD.step(torch.randn(1, D, dtype=torch.float64), cache)
    assert twin.columns == 0 and twin.length.tolist() == [0] and (twin.k == 0).all()


def test_repeated_rows_draw_seeds_of_their_own():
    cache = HEAD.new_cache(2, 4)
    HEAD.step(torch.randn(2, D, dtype=torch.float64), cache, do_sample=True)
    cache.repeat_interleave(3)
    assert len(set(cache.seeds.tolist())) == 6
    assert cache.draws.tolist() == [1] * 6


def test_bytes_per_token_are_those_documented():
    """DESIGN, cache: 768 + 32 bytes per token at the default size in bf16."""
    from dualhead_ext.config import DualHeadConfig
    from dualhead_ext.head.dual_head import DualHead

    cache = DualHead(DualHeadConfig(16, 8)).bfloat16().new_cache(1, 10)
    assert cache.k.nbytes / 10 == 768 and cache.u.nbytes / 10 == 32


def test_memo_of_numbers_is_bounded():
    cache = HEAD.new_cache(2, 4)
    for n in range(1000):
        assert cache.per_row("strength", n / 7, torch.float32).shape == (2,)
    assert len(cache._rows) <= 64


def test_crop_to_more_columns_than_an_int32_counts_keeps_all():
    cache = HEAD.new_cache(2, 4)
    HEAD.prefill(torch.randn(2, 3, HEAD.config.hidden_size).double(), cache)
    cache.crop(2**31)
    assert cache.columns == 3 and cache.length.tolist() == [3, 3]


def test_crop_refuses_negative_columns():
    with pytest.raises(ValueError, match="columns must be >= 0, got -1"):
        HEAD.new_cache(1, 2).crop(-1)
