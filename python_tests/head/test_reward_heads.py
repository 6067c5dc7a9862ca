# SPDX-License-Identifier: Apache-2.0
"""Reward heads that are corrections of the LM head: every path against formulas written out here.

The float64 tolerances are too small for any other formula to pass.
"""

import pytest
import torch

import dualhead_ext as dh
from dualhead_ext import ops, reference
from dualhead_ext.config import MIX_NAMES, DualHeadConfig
from dualhead_ext.head.dual_head import DualHead

D, V = 24, 37
KINDS = [("embedding", 0), ("embedding", 3), ("lowrank", 3)]
VARIANTS = [
    {"reward_head": kind, "reward_rank": rank, "mix": mix, "num_objectives": k, **rest}
    for kind, rank in KINDS
    for mix in MIX_NAMES
    for k, rest in (
        (1, {"gate": "attention"}),
        (2, {"gate": "linear", "bias": True, "logit_softcap": 3.0, "logit_scale": 0.5}),
        (1, {"gate": "fixed", "gate_alpha": 0.7, "logit_scale": 0.5}),
    )
]


def make_head(seed=0, dtype=torch.float64, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "vocab_size": V, "gate_num_heads": 3, "gate_head_dim": 5}
    head = DualHead(DualHeadConfig(**sizes | config)).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.4)
    return head


def deltas(head, hidden):
    """(K, B, T, V): each objective's delta, position by position."""
    reward, found = head.reward_head, []
    for k in range(head.config.num_objectives):
        rows = []
        for h in hidden.reshape(-1, D):
            change = reward.bias[k]
            if reward.down is not None:
                change = change + reward.up.weight[k] @ (reward.down.weight[k] @ h)
            rows.append(head.lm_weight @ change if reward.kind == "embedding" else change)
        found.append(torch.stack(rows).view(*hidden.shape[:-1], V))
    return torch.stack(found)


def written_out(head, hidden, alpha, shares):
    """Logits (B, T, V) of the mixture, for alpha (B, T) and shares (B, K)."""
    config = head.config
    z_lm = hidden @ head.lm_weight.T + (0 if head.lm_bias is None else head.lm_bias)
    z_rm = z_lm + torch.einsum("bk,kbtv->btv", shares, deltas(head, hidden))

    def f(z):
        z = config.logit_scale * z
        cap = config.logit_softcap
        return cap * torch.tanh(z / cap) if cap else z

    a = alpha[..., None]
    if config.mix == "logits":
        return f((1 - a) * z_lm + a * z_rm)
    return torch.log((1 - a) * torch.softmax(f(z_lm), -1) + a * torch.softmax(f(z_rm), -1))


def expected_alpha(head, gate_logit, strength):
    alpha = strength[:, None] * torch.sigmoid(gate_logit)
    return alpha if head.config.mix == "logits" else alpha.clamp(max=1)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_full_pass_is_the_formula(config):
    head = make_head(**config)
    hidden, strength = torch.randn(3, 5, D).double(), torch.tensor([1.0, 0.5, 1.7]).double()
    shares = torch.tensor([[0.3, 0.7], [1.0, -0.4], [0.0, 2.0]]).double()
    shares = shares[:, : config["num_objectives"]]
    out = head(hidden, strength=strength, objective_weights=shares)
    alpha = expected_alpha(head, head.gate(hidden), strength)
    torch.testing.assert_close(out.alpha, alpha)
    torch.testing.assert_close(out.logits, written_out(head, hidden, alpha, shares))
    even = head(hidden)
    shares = torch.full_like(shares, 1 / config["num_objectives"])
    alpha = expected_alpha(head, head.gate(hidden), torch.ones(3))
    torch.testing.assert_close(even.logits, written_out(head, hidden, alpha, shares))


@pytest.mark.parametrize("kind", [("full", 1), *KINDS], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_token_rewards_are_delta_at_the_labels(kind, bias):
    config = {"reward_head": kind[0], "reward_rank": kind[1], "num_objectives": 2, "bias": bias}
    head = make_head(**config)
    hidden, labels = torch.randn(2, 5, D).double(), torch.randint(0, V, (2, 5))
    got = head.reward_head.token_rewards(hidden, labels, head.lm_weight, head.lm_bias)
    for k in range(2):
        shares = torch.eye(2).double()[k].expand(2, 2)
        z_lm = reference.head_logits(hidden, head.lm_weight, head.lm_bias)
        delta = head.reward_logits(hidden, z_lm, shares) - z_lm
        torch.testing.assert_close(got[k], delta.gather(-1, labels[..., None]).squeeze(-1))
    if kind[0] != "full":
        written = deltas(head, hidden)[..., :].gather(-1, labels.expand(2, 2, 5)[..., None])
        torch.testing.assert_close(got, written.squeeze(-1))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_starts_as_the_lm_head(kind):
    config = DualHeadConfig(D, V, reward_head=kind[0], reward_rank=kind[1], num_objectives=2)
    head, hidden = DualHead(config), torch.randn(2, 3, D)
    out = head(hidden, strength=5.0)
    z_lm = reference.head_logits(hidden, head.lm_weight, head.lm_bias)
    torch.testing.assert_close(out.logits, z_lm)
    if kind[1]:
        assert head.reward_head.down.weight.std() > 0
    head.reward_head.token_rewards(
        hidden, torch.zeros(2, 3).long(), head.lm_weight
    ).sum().backward()
    learns = {
        n for n, p in head.reward_head.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert learns == {"bias"} | ({"up.weight"} if kind[1] else set())


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (("embedding", 0), {"bias": (2, D)}),
        (("embedding", 3), {"bias": (2, D), "down.weight": (2, 3, D), "up.weight": (2, D, 3)}),
        (("lowrank", 3), {"bias": (2, V), "down.weight": (2, 3, D), "up.weight": (2, V, 3)}),
        (("full", 3), {"weight": (2, V, D)}),
    ],
)
def test_state_dict_names(kind, shapes):
    head = make_head(reward_head=kind[0], reward_rank=kind[1], num_objectives=2)
    found = {n: tuple(p.shape) for n, p in head.state_dict().items() if "reward_head." in n}
    assert found == {f"reward_head.{name}": shape for name, shape in shapes.items()}
    other = make_head(1, reward_head=kind[0], reward_rank=kind[1], num_objectives=2)
    other.load_state_dict(head.state_dict())
    hidden = torch.randn(2, 4, D).double()
    assert torch.equal(other(hidden).logits, head(hidden).logits)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_prefill_and_steps_equal_the_full_pass(config):
    head = make_head(**config)
    hidden = torch.randn(3, 9, D).double()
    mask = torch.ones(3, 9).long()
    mask[0, :3] = mask[2, :1] = 0
    controls = {"strength": torch.tensor([0.0, 0.5, 1.7]), "gate_offset": 0.2}
    if config["num_objectives"] > 1:
        controls["objective_weights"] = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.9]])
    full, cache = head(hidden, mask, **controls), head.new_cache(3, 9)
    out = head.prefill(hidden[:, :5], cache, mask[:, :5], logits_to_keep=0, **controls)
    for name in ("logits", "alpha", "gate_logit"):
        torch.testing.assert_close(getattr(out, name), getattr(full, name)[:, :5])
    for t in range(5, 9):
        out = head.step(hidden[:, t], cache, **controls)
        for name in ("logits", "alpha", "gate_logit"):
            torch.testing.assert_close(getattr(out, name), getattr(full, name)[:, t])
        assert torch.equal(out.token, full.logits[:, t].argmax(-1))


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_strength_zero_selects_z_lm_whatever_delta_is(config):
    head = make_head(**config)
    hidden = torch.randn(2, 4, D).double()
    with torch.no_grad():
        head.reward_head.bias.fill_(torch.nan)
    plain = reference.head_logits(hidden, head.lm_weight, head.lm_bias)
    plain = reference.postprocess(plain, head.config.logit_scale, head.config.logit_softcap)
    plain = plain if config["mix"] == "logits" else torch.log_softmax(plain, -1)
    assert torch.equal(head(hidden, strength=0.0).logits, plain)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_gradients(config):
    head = make_head(**config)
    hidden = torch.randn(1, 3, D).double().requires_grad_()
    names = [n for n, p in head.named_parameters() if p.requires_grad]
    given = tuple(dict(head.named_parameters())[n] for n in names)

    def logits(hidden, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, values, (hidden,)).logits[..., :6]

    assert torch.autograd.gradcheck(logits, (hidden, *given), fast_mode=True)


def test_public_config():
    config = dh.DualHeadConfig(D, V, reward_head="lowrank", reward_rank=64)
    assert dh.DualHeadConfig.from_dict(config.to_dict()) == config


# How far the compiled step may differ from float64 with the same rounded weights.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2}


def in_double(head):
    """The head in float64 with unchanged weights: the exact result for a head of any dtype."""
    twin = DualHead(head.config).double()
    twin.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    return twin


def step_both(head, hidden, mask=None, **controls):
    """(output of the compiled step, output of the float64 reference), after the same prompt."""
    outs = []
    for one, states in ((head, hidden), (in_double(head), hidden.double())):
        cache = one.new_cache(len(hidden), hidden.shape[1])
        one.prefill(states[:, :-1], cache, mask)
        outs.append(one.step(states[:, -1], cache, **controls))
    return outs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_the_compiled_step_is_the_reference(config, dtype, monkeypatch):
    head, calls = make_head(dtype=dtype, **config), []
    with torch.no_grad():
        for parameter in head.reward_head.parameters():
            parameter.mul_(0.5)
    original = ops.decode_step

    def spy(**arguments):
        calls.append(1)
        return original(**arguments)

    monkeypatch.setattr(ops, "decode_step", spy)
    hidden = torch.randn(3, 6, D).to(dtype)
    mask = torch.ones(3, 5).long()
    mask[1, :2] = 0
    controls = {
        "strength": torch.tensor([0.0, 0.6, 1.7]),
        "gate_offset": torch.tensor([0.3, 1.5, 12.0]),
        "skip_threshold": 0.01,
    }
    if config["num_objectives"] > 1:
        controls["objective_weights"] = torch.tensor([[0.2, 0.8], [1.0, -0.5], [0.5, 0.9]])
    record = config["gate"] == "attention"
    out, truth = step_both(head, hidden, mask, record_attention=record, **controls)
    assert len(calls) == 1
    for name in ("logits", "alpha", "gate_logit", "logprob", "attention"):
        got, exact = getattr(out, name), getattr(truth, name)
        if got is not None:
            assert (got.double() - exact).abs().max() < TOLERANCE[dtype], name
    assert out.status.tolist() == [0, 0, 0]
    assert torch.equal(out.token, out.logits.argmax(-1))
    assert config["mix"] == "probs" or out.alpha[2] > 1


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_a_row_of_the_compiled_step_is_what_it_is_alone(config):
    head, hidden = make_head(dtype=torch.float32, **config), torch.randn(5, 6, D)
    seeds = torch.arange(5)

    def run(rows):
        cache = head.new_cache(len(rows), 8)
        for t in range(4):
            head.step(hidden[rows, t], cache)
        first = head.step(hidden[rows, 4], cache, do_sample=True, top_k=9, seeds=seeds[rows])
        second = head.step(hidden[rows, 5], cache, do_sample=True, top_k=9, seeds=seeds[rows])
        return first, second

    together = run([0, 1, 2, 3, 4])
    for row in range(5):
        for alone, all_rows in zip(run([row]), together, strict=True):
            for name in ("logits", "alpha", "token", "logprob"):
                assert torch.equal(getattr(alone, name)[0], getattr(all_rows, name)[row]), name


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_status_and_draws_of_full_and_broken_rows(config):
    head = make_head(dtype=torch.float32, **config)
    attends = config["gate"] == "attention"
    cache, hidden = head.new_cache(3, 4), torch.randn(3, 3, D)
    head.prefill(hidden, cache)
    if attends:
        cache.length[0] = 4  # full, but only the device knows
    last = torch.randn(3, D)
    last[2, 0] = torch.nan
    out = head.step(last, cache, do_sample=True)
    assert out.status.tolist() == [2 if attends else 0, 0, 1]
    assert cache.draws.tolist() == [0 if attends else 1, 1, 1]
    assert out.token[2] == 0 and not torch.isfinite(out.logprob[2])
    assert torch.isfinite(out.logits[1]).all()


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mix", MIX_NAMES)
def test_a_quantised_lm_head_under_a_correction(kind, format, mix):
    sizes = {"hidden_size": 128, "reward_head": kind[0], "reward_rank": kind[1], "mix": mix}
    head = make_head(dtype=torch.float32, **sizes, num_objectives=2)
    with torch.no_grad():
        head.lm_head.weight.mul_(0.2)
    reward = {name: value.clone() for name, value in head.reward_head.state_dict().items()}
    head.quantize(format)
    assert head.quantized == format and head.reward_scale is None
    kept = head.reward_head.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in reward.items())
    plain = make_head(dtype=torch.float32, **sizes, num_objectives=2)
    plain.load_state_dict(head.state_dict() | {"lm_head.weight": head.lm_head.dequantized()}, False)
    hidden, strength = torch.randn(3, 5, 128), torch.tensor([0.0, 1.0, 1.7])
    for one, other in ((head, plain), (plain, head)):
        cache, full = one.new_cache(3, 5), other(hidden, strength=strength).logits[:, -1]
        one.prefill(hidden[:, :-1], cache)
        out = one.step(hidden[:, -1], cache, strength=strength)
        torch.testing.assert_close(out.logits, full, rtol=1e-4, atol=1e-4)
