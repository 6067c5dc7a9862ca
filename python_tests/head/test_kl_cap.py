# SPDX-License-Identifier: Apache-2.0
"""max_kl limits the KL of the mixture at each token, in every place that mixes.

alpha must be the largest value that keeps the limit.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB, make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext.eval import likelihood
from dualhead_ext.head.kl_cap import capped_alpha, kl_from_backbone
from dualhead_ext.reference import mix_logits

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
MIXES = pytest.mark.parametrize("mix", ["logits", "probs"])


def heads(seed, rows, size, spread=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, size, generator=generator, dtype=dtype) * spread for _ in range(2))


def slow_kl(z_lm, z_rm, alpha, mix):
    """The definition, token by token, in float64."""
    p = torch.softmax(mix_logits(z_lm.double(), z_rm.double(), alpha.double(), mix), -1)
    q = torch.softmax(z_lm.double(), -1)
    return torch.stack([sum(a * (a / b).log() for a, b in zip(*row)) for row in zip(p, q)])  # noqa: B905


@MIXES
def test_kl_is_its_definition(mix, seed):
    z_lm, z_rm = heads(seed, 5, 13)
    alpha = torch.rand(5, dtype=torch.float64)
    expected = slow_kl(z_lm, z_rm, alpha, mix)
    torch.testing.assert_close(kl_from_backbone(z_lm, z_rm, alpha, mix), expected)


@MIXES
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.floats(0.01, 30), st.floats(0.1, 3.0))
def test_kl_grows_with_alpha(mix, seed, size, spread, scale):
    """Bisection is exact because of this. A logit scale does not change it."""
    z_lm, z_rm = heads(seed, 1, size, spread)
    alpha = torch.linspace(0, 1, 41, dtype=torch.float64)
    kl = kl_from_backbone(z_lm.expand(41, -1), z_rm.expand(41, -1), alpha, mix, scale)
    assert kl[0].abs() < 1e-12
    assert (kl.diff() >= -1e-12 * kl.max().clamp(min=1)).all()


@MIXES
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(1e-6, 3), st.sampled_from([(1.0, 0.0), (0.4, 0.0), (1.0, 3.0)])
)
def test_the_cap_holds_and_alpha_is_the_largest(mix, seed, cap, post):
    z_lm, z_rm = heads(seed, 7, 11, 3.0)
    alpha = torch.linspace(0, 1, 7, dtype=torch.float64)
    found = capped_alpha(z_lm, z_rm, alpha, torch.full((7,), cap), mix, *post)
    cap = torch.tensor(cap).double()  # rounded to fp32, like the given values
    kl, before = (kl_from_backbone(z_lm, z_rm, a, mix, *post) for a in (found, alpha))
    assert (found <= alpha).all() and (kl <= cap).all()
    assert torch.equal(found == alpha, before <= cap)  # unchanged unless the cap binds
    if post[1] == 0.0:
        bound = found < alpha
        more = kl_from_backbone(z_lm, z_rm, (found + 1e-9).clamp(max=1), mix, *post)
        assert (more[bound] > cap).all()


@MIXES
def test_more_rows_than_fit_at_once_and_any_shape(mix, seed):
    z_lm, z_rm = (z.view(3, 200, 9) for z in heads(seed, 600, 9))
    alpha, cap = torch.rand(3, 200, dtype=torch.float64), torch.tensor([0.01, 0.3, torch.inf])
    found = capped_alpha(z_lm, z_rm, alpha, cap, mix)
    for row, t in itertools.product(range(3), (0, 77, 199)):
        one = (z_lm[row, t][None], z_rm[row, t][None], alpha[row, t][None])
        assert torch.equal(capped_alpha(*one, cap[row : row + 1], mix)[0], found[row, t])
    assert torch.equal(found[2], alpha[2]) and (found[0] < alpha[0]).any()


def test_rows_that_are_not_finite_stay_loud():
    z_lm, z_rm = heads(0, 3, 5)
    z_rm[0, 2] = torch.nan
    z_rm[1, 2] = -torch.inf  # a token that the reward head excludes
    cap = torch.tensor([0.1, 0.1, torch.nan])
    for mix in ("logits", "probs"):
        found = capped_alpha(z_lm, z_rm, torch.ones(3), cap, mix)
        assert found[0] == 1.0  # the mixture is NaN, and is reported as NaN
        assert torch.isnan(found[2])
        # With the logits mix, any alpha above 0 excludes the token: KL jumps at 0, here above the
        # cap.
        assert found[1] == 0 if mix == "logits" else 0 < found[1] < 1
        assert float(kl_from_backbone(z_lm, z_rm, found, mix)[1]) <= 0.1 + 1e-6


def test_the_gradient_ends_where_the_cap_binds():
    z_lm, z_rm = heads(0, 2, 9)
    alpha = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    capped_alpha(z_lm, z_rm, alpha, torch.tensor([0.001, torch.inf])).sum().backward()
    assert alpha.grad.tolist() == [0.0, 1.0]


# --- in the head ----------------------------------------------------------------------------------


def make_head(mix, objectives=1, dtype=torch.float32):
    config = dh.DualHeadConfig(
        hidden_size=16,
        vocab_size=37,
        gate_num_heads=2,
        gate_head_dim=4,
        mix=mix,
        num_objectives=objectives,
        logit_scale=1.5,
        logit_softcap=4.0,
    )
    head = dh.DualHead(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return head.to(dtype)


def kl_of(logits, backbone):
    p, q = (torch.log_softmax(x.double(), -1) for x in (logits, backbone))
    return (p.exp() * (p - q)).sum(-1)


@MIXES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_full_pass_prefill_and_step_agree(mix, dtype):
    head, cap = make_head(mix, 2, dtype), torch.tensor([0.02, torch.inf, 0.0])
    hidden = torch.randn(3, 6, 16).to(dtype)
    with torch.no_grad():
        full, free, off = (
            head(hidden, **controls) for controls in ({"max_kl": cap}, {}, {"strength": 0.0})
        )
    kl = kl_of(full.logits, off.logits)
    assert (kl[0] <= 0.02 + 1e-6).all() and (kl_of(free.logits, off.logits)[0] > 0.02).any()
    assert torch.equal(full.logits[1], free.logits[1]) and torch.equal(full.alpha[1], free.alpha[1])
    assert torch.equal(full.logits[2], off.logits[2]) and not full.alpha[2].any()
    cache = head.new_cache(3, 6)
    first = head.prefill(hidden[:, :4], cache, logits_to_keep=0, max_kl=cap)
    steps = [head.step(hidden[:, t].contiguous(), cache, max_kl=cap) for t in (4, 5)]
    close = (
        {"rtol": 1e-3, "atol": 1e-3} if dtype != torch.bfloat16 else {"rtol": 0.05, "atol": 0.05}
    )
    torch.testing.assert_close(first.logits, full.logits[:, :4], **close)
    for t, out in zip((4, 5), steps, strict=True):
        torch.testing.assert_close(out.logits, full.logits[:, t], **close)
        assert torch.equal(out.token, out.logits.argmax(-1))
        assert kl_of(out.logits, off.logits[:, t])[0] <= 0.02 + (
            1e-6 if dtype != torch.bfloat16 else 1e-3
        )


def test_a_quantised_head_is_capped_too():
    head = make_head("logits").quantize("int8")
    cache, hidden = head.new_cache(2, 3), torch.randn(2, 16)
    off = head.step(hidden, head.new_cache(2, 3), strength=0.0)
    out = head.step(hidden, cache, max_kl=0.01)
    assert (kl_of(out.logits, off.logits) <= 0.01 + 1e-6).all() and (out.alpha > 0).all()


def test_controls_are_checked():
    head, hidden = make_head("logits"), torch.randn(2, 3, 16)
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"DualHead.forward: max_kl must be a number >= 0"):
            head(hidden, max_kl=bad)
    with pytest.raises(ValueError, match=r"max_kl must be \(2,\), got \(3,\)"):
        head(hidden, max_kl=torch.ones(3))
    cache = head.new_cache(2, 3)
    with pytest.raises(TypeError, match="max_kl must be a number >= 0"):
        head.prefill(hidden, cache, max_kl="1")
    assert cache.columns == 0


# --- in the model ---------------------------------------------------------------------------------


@pytest.mark.quick_cases(8)
@MIXES
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_the_backbones_own_text(family, mix):
    model, batch = make_model(family, mix=mix), prompts()
    expected = make_backbone(family).generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, max_kl=0.0), expected)
    free = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, max_kl=float("inf")), free)
    assert not torch.equal(free, expected)


@MIXES
@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "granite-scale"])
def test_generate_keeps_within_each_rows_cap(family, mix):
    """The distribution of each token, against the backbone's distribution after the same text."""
    model, batch, caps = make_model(family, mix=mix), prompts(), [0.03, 0.5, 0.0]
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**batch, **options, max_kl=caps, output_gate=True)
    mask = torch.cat((batch["attention_mask"], torch.ones(3, NEW, dtype=torch.long)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = make_backbone(family)(out.sequences, attention_mask=mask, position_ids=positions)
    kl = kl_of(torch.stack(out.logits, 1), full.logits[:, -NEW - 1 : -1])
    assert (kl.amax(1) <= torch.tensor(caps) + 1e-4).all()  # the two passes round differently
    assert kl[0].max() > 0.03 - 1e-4  # the cap binds
    assert not out.gate_alpha[2].any() and (out.gate_alpha[0] > 0).all()


def test_beams_and_samples_repeat_the_cap():
    model, batch = make_model("llama"), prompts()
    caps = {"max_kl": torch.tensor([0.05, 0.4, 0.0])}
    beams = {"num_beams": 3, "num_return_sequences": 2} | GREEDY | caps
    cached = model.generate(**batch, **beams)
    assert torch.equal(cached, model.generate(**batch, **beams, use_cache=False))


def test_likelihoods_under_a_cap(seed):
    model = make_model("llama", mix="probs")
    ids = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [likelihood.Text(ids, [0] * 3 + [1] * 9)]
    lm = likelihood.of_model(model, strength=0.0)
    free, capped = (likelihood.of_model(model, **c) for c in ({}, {"max_kl": 0.02}))
    assert float(likelihood.token_kl(capped, lm, texts)[0].max()) <= 0.02 + 1e-5
    assert float(likelihood.token_kl(free, lm, texts)[0].max()) > 0.02


@MIXES
def test_a_strong_model_keeps_within_its_cap(mix):
    strong, weak, batch = make_backbone("llama", seed=9), make_model("qwen3", mix=mix), prompts()
    guided = dh.WeakToStrong(strong, weak)
    expected = strong.generate(**batch, **GREEDY)
    assert torch.equal(guided.generate(**batch, **GREEDY, max_kl=0.0), expected)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        off = strong(ids).logits
    kl = kl_of(guided(ids, max_kl=0.05).logits, off)
    assert kl.max() <= 0.05 + 1e-6 and kl.max() > 0.049
    assert kl_of(guided(ids).logits, off).max() > 0.06


def test_a_static_cache_gives_the_same_text():
    model, batch = make_model("llama"), prompts()
    capped = GREEDY | {"max_kl": [0.05, 0.4, 0.0]}
    static = {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**batch, **capped)
    assert torch.equal(model.generate(**batch, **capped, **static), expected)


@MIXES
def test_it_compiles_without_a_break(mix, seed):
    z_lm, z_rm = heads(seed, 4, 9)
    arguments = (z_lm, z_rm, torch.rand(4), torch.tensor([0.1, 0.01, 0.0, torch.inf]), mix)
    torch.compiler.reset()
    compiled = torch.compile(capped_alpha, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), capped_alpha(*arguments))
