# SPDX-License-Identifier: Apache-2.0
"""Controls and sampling as objects, and the package's formulas against the reference's."""

import inspect
from dataclasses import fields

import pytest
import torch

import dualhead_ext as dh
from dualhead_ext import reference
from dualhead_ext.head import mixture, token_choice
from dualhead_ext.head.controls import Controls, Sampling

F32, CPU = torch.float32, torch.device("cpu")


def test_public_methods_show_every_field():
    for method, kinds in (
        (dh.DualHead.forward, (Controls,)),
        (dh.DualHead.prefill, (Controls,)),
        (dh.DualHead.step, (Controls, Sampling)),
    ):
        shown = inspect.signature(method).parameters
        assert all(shown[f.name].default == f.default for kind in kinds for f in fields(kind))


def test_an_unknown_argument_is_named():
    head = dh.DualHead(dh.DualHeadConfig(hidden_size=8, vocab_size=11, gate_num_heads=2))
    cache = head.new_cache(1, 2)
    with pytest.raises(TypeError, match=r"DualHead\.step: unknown arguments strenght"):
        head.step(torch.ones(1, 8), cache, strenght=1.0)
    with pytest.raises(TypeError, match=r"DualHead\.prefill: unknown arguments top_k"):
        head.prefill(torch.ones(1, 2, 8), cache, top_k=3)
    with pytest.raises(TypeError, match=r"DualHead\.forward: unknown arguments seeds"):
        head(torch.ones(1, 2, 8), seeds=torch.ones(1))
    assert cache.columns == 0


def test_fields_are_taken_out_of_arguments():
    arguments = {"strength": 2.0, "top_k": 3, "max_new_tokens": 4}
    controls, sampling = Controls.take(arguments), Sampling.take(arguments)
    assert arguments == {"max_new_tokens": 4}
    assert controls.given() == {"strength": 2.0} and sampling.top_k == 3


def test_rows_repeat_and_select():
    given = Controls(strength=[0.5, 2.0], alpha=0.25, objective_weights=[1.0, 3.0])
    rows = given.rows("test", 2, 2, F32, CPU)
    assert rows.strength.tolist() == [0.5, 2.0] and rows.alpha.tolist() == [0.25, 0.25]
    assert rows.objective_weights.tolist() == [[1.0, 3.0]] * 2
    assert rows.repeat(2).strength.tolist() == [0.5, 0.5, 2.0, 2.0]
    # Here K = B, so that shared objective weights could be mistaken for one weight per request.
    assert rows.select(torch.tensor([1, 0, 1])).objective_weights.tolist() == [[1.0, 3.0]] * 3
    assert set(rows.operands()) == {"strength", "alpha", "objective_weights"}
    assert "max_kl" not in Controls(max_kl=torch.ones(2)).operands()
    with pytest.raises(ValueError, match=r"test: alpha must be a number in \[0, 1\], got 2"):
        Controls(alpha=2).rows("test", 2, 2, F32, CPU)


def test_a_filter_that_does_nothing_is_left_out():
    head = dh.DualHead(dh.DualHeadConfig(hidden_size=8, vocab_size=11, gate_num_heads=2))
    cache = head.new_cache(3, 2)
    rows = Sampling(True, temperature=0.5, seeds=torch.arange(3)).rows("test", cache, F32)
    found = rows.operands("test", cache)
    assert {name for name, value in found.items() if value is None} == {"top_k", "top_p", "min_p"}
    assert found["temperature"].tolist() == [0.5] * 3 and found["draws"] is cache.draws
    assert Sampling(temperature=0.5).rows("test", cache, F32).operands("test", cache) == {}


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_alpha_is_the_oracles(mix, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = 64
    logit = torch.randn(rows, generator=generator) * 4
    values = {
        "gate_offset": torch.randn(rows, generator=generator),
        "alpha": torch.rand(rows, generator=generator),
        "strength": (torch.rand(rows, generator=generator) * 3 - 0.5),
        "skip_threshold": torch.rand(rows, generator=generator) / 2,
    }
    values["strength"][::7] = 0.0
    values["alpha"][::14] = torch.nan
    for bits in range(16):
        given = {n: v for i, (n, v) in enumerate(values.items()) if bits >> i & 1}
        got_logit, got = mixture.mixing_weight(logit, Controls(**given), mix)
        offset = given.pop("gate_offset", torch.zeros(()))
        assert torch.equal(got_logit, logit + offset)
        expected = reference.mixing_weight(logit + offset, **given, mix=mix)
        assert torch.equal(got.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_tokens_are_the_oracles(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, vocab = 24, 57
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[:, 7] = logits[:, 40]  # equal values rank by index
    draw = {"seeds": torch.arange(rows), "draws": torch.arange(rows) % 5}
    filters = {
        "temperature": torch.rand(rows, generator=generator) * 2,
        "top_k": torch.randint(-1, vocab + 3, (rows,), generator=generator, dtype=torch.int32),
        "top_p": torch.rand(rows, generator=generator) * 1.2,
        "min_p": torch.rand(rows, generator=generator) - 0.3,
    }
    filters["temperature"][::5] = 0.0
    for bits in range(16):
        given = draw | {n: v for i, (n, v) in enumerate(filters.items()) if bits >> i & 1}
        expected = reference.sample_token(logits, **given)
        assert torch.equal(token_choice.sample_token(logits, **given), expected)


def test_a_row_that_is_not_finite_takes_token_0():
    logits = torch.zeros(3, 5)
    logits[0, 2], logits[1, 3] = torch.nan, 4.0
    token, logprob, failed = token_choice.choose_token(
        logits, {}, torch.tensor([False, False, True])
    )
    assert token.tolist() == [0, 3, 0] and failed.tolist() == [True, False, True]
    assert torch.isnan(logprob).tolist() == [True, False, True]
