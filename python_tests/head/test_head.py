# SPDX-License-Identifier: Apache-2.0
"""DualHead: full pass, prefill and step against the reference and each other, and controls."""

import copy

import pytest
import torch
from small_heads import D, V, make_head
from torch.utils._python_dispatch import TorchDispatchMode

from dualhead_ext import reference
from dualhead_ext.config import GATE_NAMES, MIX_NAMES, DualHeadConfig
from dualhead_ext.head.dual_head import DualHead
from dualhead_ext.head.gate import GATES


def full_reference(head, hidden, mask=None, alpha=None):
    """The paper's formulas, unfolded, with the head's own weights."""
    gate, config = head.gate, head.config
    logit = reference.attention_gate_logit(
        hidden,
        *(getattr(gate, f"{n}_weight") for n in "qkvo"),
        gate.out_weight,
        gate.out_bias,
        gate.num_heads,
        mask,
    )
    a = torch.sigmoid(logit) if alpha is None else torch.full_like(logit, alpha)
    z_lm = reference.head_logits(hidden, head.lm_weight, head.lm_bias)
    z_rm = reference.reward_logits(hidden, head.reward_head.weight, head.reward_head.bias, None)
    return reference.mix_logits(
        z_lm, z_rm, a, config.mix, config.logit_scale, config.logit_softcap
    ), logit


def ragged(seed, batch, length):
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[:, -1] = True
    return mask.long()


VARIANTS = [
    {"mix": mix, "gate": gate, "num_objectives": k, "bias": k == 2, "logit_softcap": cap}
    for mix in MIX_NAMES
    for gate in GATE_NAMES
    for k, cap in ((1, 0.0), (2, 3.0))
]


def test_registries_agree():
    assert set(GATES) == set(GATE_NAMES)


@pytest.mark.parametrize("mix", MIX_NAMES)
def test_full_pass_is_the_papers(mix):
    head = make_head(mix=mix, num_objectives=2, bias=True, logit_scale=0.5, logit_softcap=2.0)
    hidden, mask = torch.randn(4, 7, D, dtype=torch.float64), ragged(5, 4, 7)
    out = head(hidden, mask)
    logits, gate_logit = full_reference(head, hidden, mask)
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.gate_logit, gate_logit)
    torch.testing.assert_close(out.alpha, torch.sigmoid(gate_logit))


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("chunks", [(9,), (4, 2, 3), (1, 1, 4)])
def test_prefill_and_steps_equal_the_full_pass(config, chunks):
    head = make_head(**config)
    hidden, mask = torch.randn(3, 9, D, dtype=torch.float64), ragged(8, 3, 9)
    controls = {"strength": torch.tensor([1.0, 0.5, 1.7]), "gate_offset": 0.2}
    if config["num_objectives"] > 1:
        controls["objective_weights"] = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.9]])
    mask[:, sum(chunks) :] = 1  # a step's token is never padding
    full = head(hidden, mask, **controls)
    cache, start = head.new_cache(3, 9), 0
    for chunk in chunks:
        stop = start + chunk
        part = hidden[:, start:stop]
        out = head.prefill(part, cache, mask[:, :stop], logits_to_keep=0, **controls)
        for name in ("logits", "alpha", "gate_logit"):
            expected = getattr(full, name)[:, start:stop]
            torch.testing.assert_close(getattr(out, name), expected)
        start = stop
    for t in range(start, 9):
        out = head.step(hidden[:, t], cache, **controls)
        for name in ("logits", "alpha", "gate_logit"):
            torch.testing.assert_close(getattr(out, name), getattr(full, name)[:, t])
        assert out.status.tolist() == [0, 0, 0]


def test_prefill_counts_from_each_rows_last_real_token():
    head, hidden = make_head(), torch.randn(3, 6, D, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]])
    full = head(hidden, mask)
    out = head.prefill(hidden, head.new_cache(3, 6), mask, logits_to_keep=2)
    for row, kept in enumerate(([1, 2], [4, 5], [2, 3])):
        torch.testing.assert_close(out.logits[row], full.logits[row, kept])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_what_it_is_alone(side):
    head, hidden = make_head(), torch.randn(1, 4, D, dtype=torch.float64)
    junk = torch.full((1, 3, D), 1e3, dtype=torch.float64)
    padded = torch.cat((junk, hidden) if side == "left" else (hidden, junk), dim=1)
    mask = torch.zeros(1, 7, dtype=torch.long)
    real = slice(3, 7) if side == "left" else slice(0, 4)
    mask[:, real] = 1
    alone, together = head(hidden), head(padded, mask)
    torch.testing.assert_close(together.logits[:, real], alone.logits)
    cache, alone_cache = head.new_cache(1, 9), head.new_cache(1, 9)
    first = head.prefill(padded, cache, mask)
    torch.testing.assert_close(first.logits, head.prefill(hidden, alone_cache).logits)
    following = torch.randn(1, D, dtype=torch.float64)
    step, alone_step = head.step(following, cache), head.step(following, alone_cache)
    torch.testing.assert_close(step.logits, alone_step.logits)


@pytest.mark.parametrize("config", VARIANTS)
def test_what_padding_holds_has_no_part(config):
    """Not even NaN, which a backbone gives where an attention row is masked completely."""
    head, hidden, mask = make_head(**config), torch.randn(2, 6, D).double(), torch.ones(2, 6)
    mask[0, :3] = mask[1, 4:] = 0
    poisoned = hidden.masked_fill(mask[..., None] == 0, torch.nan)
    real, found = mask.bool(), []
    for states in (hidden, poisoned):
        with torch.no_grad():
            whole = head(states, attention_mask=mask)
            cache = head.new_cache(2, 8)
            head.prefill(states[:, :4], cache, attention_mask=mask[:, :4])
            prompt = head.prefill(states[:, 4:], cache, attention_mask=mask)
        step = head.step(hidden[:, 0], cache)
        found.append((whole.gate_logit[real], whole.logits[real], prompt.logits[0], step.logits))
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("reward_head", ["full", "embedding", "lowrank"])
def test_no_copies_of_a_matrix_for_strided_hidden_states(reward_head):
    """PyTorch copies the weight once per request for a bf16 product of (B, 1, d) slices."""
    head = make_head(dtype=torch.bfloat16, reward_head=reward_head, reward_rank=2)
    last = torch.randn(32, 5, D, dtype=torch.bfloat16)[:, -1:]
    with torch.no_grad(), Copies() as copies:
        head.reward_logits(last, head.lm_logits(last), None)
    assert set(copies.products) == {2} and copies.largest == 32 * V


class Copies(TorchDispatchMode):
    """The dimensions of the products' operands, and the number of elements of the largest tensor
    that was made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            self.products.append(args[-1].dim())
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def test_strength_zero_is_the_lm_head_itself():
    head = make_head(dtype=torch.float32)
    with torch.no_grad():
        head.reward_head.weight.fill_(torch.inf)
    hidden = torch.randn(2, 3, D)
    assert torch.equal(head(hidden, strength=0).logits, head.lm_head(hidden))
    per_row = head(hidden, strength=torch.tensor([0.0, 1.0])).logits
    assert torch.isfinite(per_row[0]).all() and not torch.isfinite(per_row[1]).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.93])
def test_attention_gate_of_zero_weights_is_a_fixed_gate(alpha):
    """The construction in the theorem: W_g = 0 and b_g = logit(alpha)."""
    head = make_head()
    with torch.no_grad():
        head.gate.out_weight.zero_()
        head.gate.out_bias.fill_(torch.logit(torch.tensor(alpha, dtype=torch.float64)))
    hidden = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(head(hidden).logits, head(hidden, alpha=alpha).logits)


@pytest.mark.parametrize("config", [{"gate": "fixed", "gate_alpha": 0.3}, {"gate": "attention"}])
def test_merge_fixed_is_one_linear_layer(config):
    head = make_head(num_objectives=2, bias=True, **config)
    hidden = torch.randn(2, 5, D, dtype=torch.float64)
    alpha = None if config["gate"] == "fixed" else 0.7
    merged = head.merge_fixed(alpha, objective_weights=[0.4, 0.9])
    expected = head(hidden, alpha=alpha, objective_weights=[0.4, 0.9]).logits
    torch.testing.assert_close(merged(hidden), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(merged, torch.nn.Linear)


def test_merge_fixed_refuses_what_is_not_linear():
    with pytest.raises(ValueError, match='mix="logits"'):
        make_head(mix="probs", gate="fixed").merge_fixed()
    with pytest.raises(ValueError, match="alpha must be given"):
        make_head().merge_fixed()


def test_merge_objectives_costs_one_head():
    head = make_head(num_objectives=3, bias=True)
    hidden, weights = torch.randn(2, 5, D, dtype=torch.float64), torch.tensor([0.2, 1.5, -0.3])
    merged = head.merge_objectives(weights)
    assert merged.reward_head.weight.shape == (1, V, D)
    assert merged.lm_head.weight is head.lm_head.weight and merged.gate is head.gate
    expected = head(hidden, objective_weights=weights).logits
    torch.testing.assert_close(merged(hidden).logits, expected)


def test_from_lm_head_shares_and_starts_as_the_lm_head():
    linear = torch.nn.Linear(D, V, bias=True).to(torch.bfloat16)
    head = DualHead.from_lm_head(linear, gate_num_heads=2, num_objectives=2)
    assert head.lm_head is linear and not linear.weight.requires_grad
    assert head.reward_head.weight.dtype == torch.bfloat16
    for k in range(2):
        assert torch.equal(head.reward_head.weight[k], linear.weight)
        assert torch.equal(head.reward_head.bias[k], linear.bias)
    assert head.reward_head.weight.data_ptr() != linear.weight.data_ptr()
    out = head(torch.randn(1, 3, D, dtype=torch.bfloat16))
    assert (out.alpha == 0.5).all() and out.logits.dtype == torch.float32
    with pytest.raises(ValueError, match=f"vocab_size is {V} in lm_head, got 99"):
        DualHead.from_lm_head(linear, vocab_size=99)


def test_state_dict_names_are_those_files_use():
    names = {
        "lm_head.weight": (V, D),
        "lm_head.bias": (V,),
        "reward_head.weight": (2, V, D),
        "reward_head.bias": (2, V),
        "gate.q_proj.weight": (15, D),
        "gate.k_proj.weight": (15, D),
        "gate.v_proj.weight": (15, D),
        "gate.o_proj.weight": (15, 15),
        "gate.out.weight": (1, 15),
        "gate.out.bias": (1,),
    }
    state = make_head(num_objectives=2, bias=True).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == names


def test_gate_size_of_the_paper():
    config = DualHeadConfig(hidden_size=4096, vocab_size=32000)
    with torch.device("meta"):
        gate = GATES["attention"](config)
    assert sum(p.numel() for p in gate.parameters()) == 3 * 4096 * 384 + 384 * 384 + 385


@pytest.mark.parametrize("mix", MIX_NAMES)
def test_gradients_reach_the_gate_and_the_reward_head(mix):
    head = make_head(mix=mix)
    head.lm_head.requires_grad_(False)
    names = [n for n, p in head.named_parameters() if p.requires_grad]
    values = tuple(head.get_parameter(n).detach().requires_grad_() for n in names)
    hidden = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])

    def run(hidden, *values):
        call = torch.func.functional_call
        return call(head, dict(zip(names, values, strict=True)), (hidden, mask)).logits[..., :3]

    assert torch.autograd.gradcheck(run, (hidden, *values), fast_mode=True)


def test_fp32_heads_beside_a_bf16_lm_head():
    """As in training: weights are cast for the products, and decoding uses a cast copy."""
    head = make_head(dtype=torch.float32)
    head.lm_head.to(torch.bfloat16)
    hidden = torch.randn(2, 4, D).bfloat16()
    out = head(hidden)
    cast = copy.deepcopy(head).to(torch.bfloat16)
    # The gate's output layer stays in fp32 here, and is rounded in the cast copy.
    torch.testing.assert_close(out.logits, cast(hidden).logits, rtol=0.02, atol=0.05)
    cache = head.new_cache(2, 4)
    assert cache.k.dtype == torch.bfloat16
    head.prefill(hidden[:, :3], cache)
    step = head.step(hidden[:, 3], cache)
    torch.testing.assert_close(step.logits, out.logits[:, 3], rtol=0.05, atol=0.1)


@pytest.mark.parametrize("change", ["update", "load", "cast"])
def test_a_cache_is_bound_to_its_weights(change):
    head, hidden = make_head(dtype=torch.float32), torch.randn(2, D)
    cache = head.new_cache(2, 4)
    head.step(hidden, cache)
    if change == "update":
        optimizer = torch.optim.SGD(head.gate.parameters(), lr=0.1)
        head(hidden[:, None]).alpha.sum().backward()
        optimizer.step()
    elif change == "load":
        head.load_state_dict(copy.deepcopy(head.state_dict()))
    else:
        head.bfloat16()
        hidden = hidden.bfloat16()
    length = cache.length.clone()
    with pytest.raises(RuntimeError, match="weights have changed"):
        head.step(hidden, cache)
    with pytest.raises(RuntimeError, match="weights have changed"):
        head.prefill(hidden[:, None], cache)
    assert torch.equal(cache.length, length)


def test_sampling_depends_on_seed_and_draw_alone():
    head = make_head(dtype=torch.float32)
    hidden, seeds = torch.randn(4, 3, D), torch.tensor([5, 5, 6, 7])
    hidden[1] = hidden[0]

    def tokens(rows):
        cache = head.new_cache(len(rows), 3)
        sampled = {"do_sample": True, "temperature": 3.0, "seeds": seeds[rows]}
        out = [head.step(hidden[rows, t], cache, **sampled).token for t in range(3)]
        return torch.stack(out, 1)

    together = tokens([0, 1, 2, 3])
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[[3, 2]], tokens([3, 2]))
    generator = torch.Generator().manual_seed(3)
    caches = [head.new_cache(4, 3), head.new_cache(4, 3)]
    first = head.step(hidden[:, 0], caches[0], do_sample=True, generator=generator)
    generator.manual_seed(3)
    second = head.step(hidden[:, 0], caches[1], do_sample=True, generator=generator)
    assert torch.equal(caches[0].seeds, caches[1].seeds) and torch.equal(first.token, second.token)


def test_greedy_by_temperature_zero_for_some_rows():
    head, hidden = make_head(dtype=torch.float32), torch.randn(3, D)
    greedy = head.step(hidden, head.new_cache(3, 1)).token
    mixed = head.step(
        hidden, head.new_cache(3, 1), do_sample=True, temperature=torch.tensor([0.0, 9.0, 0.0])
    )
    assert torch.equal(mixed.token[::2], greedy[::2])


def test_record_attention():
    head, hidden = make_head(), torch.randn(2, 5, D, dtype=torch.float64)
    cache = head.new_cache(2, 8)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    head.prefill(hidden[:, :4], cache, mask)
    out = head.step(hidden[:, 4], cache, record_attention=True)
    assert out.attention.shape == (2, 3, 5)
    torch.testing.assert_close(out.attention.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    assert (out.attention[0, :, 0] == 0).all() and (out.attention[1] > 0).all()


def test_not_finite_hidden_states_stay_in_their_row():
    head, hidden = make_head(dtype=torch.float32), torch.randn(3, 4, D)
    clean = head(hidden)
    hidden[1, 2, 0] = torch.nan
    out = head(hidden)
    assert torch.equal(out.logits[::2], clean.logits[::2])
    assert torch.isnan(out.logits[1, 2:]).all()
