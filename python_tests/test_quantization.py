# SPDX-License-Identifier: Apache-2.0
"""Quantised weights: what they mean, how large their error can be, and heads that hold them."""

from __future__ import annotations

import copy

import pytest
import torch

from dualhead_ext import DualHead, DualHeadConfig
from dualhead_ext.quantization import FORMATS, dequantize, quantize

NAMES = tuple(FORMATS)


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return (weight * torch.logspace(-2, 2, shape[-2])[:, None]).to(dtype)


def make_head(dtype: torch.dtype = torch.float32, **config) -> DualHead:
    torch.manual_seed(2)
    settings = {"hidden_size": 256, "vocab_size": 67, "gate_num_heads": 2, "gate_head_dim": 8}
    head = DualHead(DualHeadConfig(**settings | config))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) / 16)
    return head.to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7, 128), (3, 5, 384)])
def test_error_is_at_most_half_a_step(name, shape):
    weight = random_weight(*shape)
    q, scale = quantize(weight, name)
    assert q.dtype == FORMATS[name].dtype and scale.dtype == torch.float32
    got = dequantize(q, scale, torch.float64)
    assert got.shape == weight.shape
    error = (got - weight.double()).abs()
    if name == "fp8":  # 3 bits after the point; 2^-10 is half of the smallest number
        allowed = (weight.double().abs() * 2.0**-4).maximum(scale.double()[..., None] * 2.0**-10)
    elif name == "int8":
        allowed = scale.double()[..., None] / 2
    else:
        allowed = scale.double().repeat_interleave(128, -1) / 2
    assert (error <= allowed * (1 + 1e-5)).all()


def test_int4_bytes_are_as_documented():
    weight = torch.arange(-128.0, 128.0)[None] / 16
    q, scale = quantize(weight, "int4")
    assert q.shape == (1, 128) and scale.shape == (1, 2)
    values = dequantize(q, scale)
    for j, i in ((0, 0), (0, 63), (1, 5)):
        byte = int(q[0, 64 * j + i])
        for offset, nibble in ((0, byte & 15), (64, byte >> 4)):
            assert values[0, 128 * j + offset + i] == (nibble - 8) * scale[0, j]


@pytest.mark.parametrize("name", NAMES)
def test_zero_tiny_and_nan_rows(name):
    weight = torch.zeros(3, 128)
    weight[1] = 1e-44
    weight[2, 3] = torch.nan
    values = dequantize(*quantize(weight, name))
    assert (values[0] == 0).all() and torch.isfinite(values[1]).all()
    assert torch.isnan(values[2]).any()


def test_refusals():
    with pytest.raises(ValueError, match="int4 needs a hidden size that is a multiple of 128"):
        quantize(torch.zeros(2, 100), "int4")
    with pytest.raises(ValueError, match="must be one of int8, fp8, int4, got 'int3'"):
        make_head().quantize("int3")
    with pytest.raises(TypeError, match=r"plain floating point, got torch\.int8"):
        quantize(torch.zeros(2, 4, dtype=torch.int8), "int8")
    with pytest.raises(TypeError, match="must be quantised"):
        dequantize(torch.zeros(2, 4), torch.ones(2))
    head = make_head().quantize("int8")
    for refused in (
        lambda: head.quantize("int8"),
        lambda: head.merge_fixed(0.5),
        lambda: head.merge_objectives([1.0]),
        lambda: head.reward_head.requires_grad_(True),
    ):
        with pytest.raises(RuntimeError, match="quantised"):
            refused()


def test_a_refused_format_leaves_the_head_as_it_was():
    head = make_head(hidden_size=100)
    before = head.state_dict()
    with pytest.raises(ValueError, match="multiple of 128"):
        head.quantize("int4")
    after = head.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)


def meaning(head: DualHead) -> DualHead:
    """An unquantised float64 head with the numbers that ``head``'s heads mean."""
    plain = make_head(torch.float64, **head.config.to_dict())
    state = {n: v.double() for n, v in head.state_dict().items() if n.startswith("gate.")}
    for part in ("lm_head", "reward_head"):
        module = getattr(head, part)
        state[f"{part}.weight"] = dequantize(module.weight, module.weight_scale, torch.float64)
        if module.bias is not None:
            state[f"{part}.bias"] = module.bias.double()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"num_objectives": 3, "mix": "probs", "bias": True}])
def test_heads_decode_what_their_numbers_mean(name, dtype, config):
    head = make_head(dtype, **config).quantize(name)
    plain = meaning(head)
    hidden = torch.randn(3, 6, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    alpha = torch.tensor([0.0, 0.3, 1.0])
    controls = {"alpha": alpha}
    if head.config.num_objectives > 1:
        controls["objective_weights"] = torch.tensor([0.5, -0.25, 2.0]).expand(3, 3)
    exact = {n: value.double() for n, value in controls.items()}
    expected = plain(hidden.double(), **exact).logits
    got = head(hidden, **controls).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)
    cache = head.new_cache(3, 6)
    head.prefill(hidden[:, :-1], cache, **controls)
    out = head.step(hidden[:, -1], cache, **controls)
    torch.testing.assert_close(out.logits.double(), expected[:, -1], rtol=2e-5, atol=2e-5)
    assert torch.equal(out.token, out.logits.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_casts_leave_the_numbers_alone(name):
    head = make_head().quantize(name)
    before = {n: v.clone() for n, v in head.state_dict().items() if "head.weight" in n}
    cast = copy.deepcopy(head).to(torch.bfloat16)
    assert cast.hidden_dtype == torch.bfloat16 and cast.gate.out.weight.dtype == torch.bfloat16
    for n, value in before.items():
        after = cast.state_dict()[n]
        assert after.dtype == value.dtype and torch.equal(
            after.view(torch.uint8), value.view(torch.uint8)
        )
    assert not any(p.requires_grad for p in cast.reward_head.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_safetensors_restore_bit_for_bit(name, tmp_path):
    from safetensors.torch import load_file, save_file

    head = make_head(torch.bfloat16).quantize(name)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    twin = make_head(torch.bfloat16).quantize(name)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(load_file(tmp_path / "head.safetensors"))
    for n, value in head.state_dict().items():
        assert torch.equal(value.view(torch.uint8), twin.state_dict()[n].view(torch.uint8)), n


def test_a_shared_lm_head_keeps_its_weights():
    linear = torch.nn.Linear(128, 9, bias=False)
    before = linear.weight.detach().clone()
    head = DualHead.from_lm_head(linear).quantize("int8")
    assert head.lm_weight.dtype == torch.int8
    assert torch.equal(linear.weight, before)
