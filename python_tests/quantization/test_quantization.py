# SPDX-License-Identifier: Apache-2.0
"""Quantised weights: their values, bounds of their error, and heads that hold them."""

from __future__ import annotations

import copy

import pytest
import torch
from hidden_states import hidden_states

from dualhead_ext import DualHead, DualHeadConfig
from dualhead_ext.config import FORMAT_NAMES
from dualhead_ext.quantization import FORMATS, dequantize, quantize, stand_ins
from dualhead_ext.quantization.rounding import feedback_factor, round_with_feedback

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
    groups = 1 if FORMATS[name].group is None else shape[-1] // 128
    scale = (
        scale.double().abs().view(*shape[:-1], groups).repeat_interleave(shape[-1] // groups, -1)
    )
    if name == "fp8":  # fp8 has 3 bits after the point; 2^-10 is half of the smallest value
        allowed = (weight.double().abs() * 2.0**-4).maximum(scale * 2.0**-10)
    elif name == "int8":
        allowed = scale / 2
    else:  # values beyond the ends of a group's range are clipped
        allowed = torch.where(weight.double().abs() < 7 * scale, scale / 2, torch.inf)
    assert (error <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_no_scale_of_the_search_is_better(name):
    """A slow search, group by group, finds the same scales.

    They are no worse than the maximum's.
    """
    weight, kind = random_weight(5, 256), FORMATS[name]
    scale = quantize(weight, name)[1]
    largest = {"fp8": 448.0, "int4": 7.5}[name]
    for v, row in enumerate(weight.unflatten(-1, (-1, kind.group or 256))):
        for g, group in enumerate(row):

            def error(s: torch.Tensor, group=group) -> torch.Tensor:
                numbers = (group / s).clamp(-448, 448).to(torch.float8_e4m3fn).float()
                if name == "int4":
                    numbers = (group / s).round().clamp(-8, 7)
                return (numbers * s - group).square().sum()

            base = group.abs().max()
            tried = [base / kind.largest * factor for factor in kind.factors]
            got = scale[v].reshape(-1)[g]
            assert torch.equal(got, min(tried, key=error))
            assert error(got) <= error(base / largest)


def test_fp8_rounding_is_torchs():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(4)) * torch.logspace(
        -6, 3, 20000
    )
    ties = torch.arange(0.0, 256.0) / 16 * 2.0**-6
    x = torch.cat((x, ties, -ties, torch.tensor([448.0, -449.0, torch.nan, torch.inf, -0.0])))
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(FORMATS["fp8"].round(x).nan_to_num(1), expected.nan_to_num(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [128, 384])
def test_calibration_lessens_the_error_of_products(name, d):
    weight, hidden = random_weight(9, d), hidden_states(700, d)
    calibration, unseen = hidden[:500].view(5, 100, d), hidden[500:]
    truth = unseen @ weight.T
    errors = []
    for given in (None, calibration):
        q, scale = quantize(weight, name, given)
        assert q.dtype == FORMATS[name].dtype
        errors.append((unseen @ dequantize(q, scale).T - truth).square().mean(0))
        if given is not None:
            assert torch.equal(scale, quantize(weight, name)[1])
            again = quantize(weight, name, given)
            assert all(
                map(
                    torch.equal,
                    (q.view(torch.uint8), scale),
                    (again[0].view(torch.uint8), again[1]),
                )
            )
    assert (errors[1] < errors[0] / 2).float().mean() > 0.8, errors


def test_feedback_is_least_squares_step_by_step():
    """By definition, after each input is rounded, the later weights are found again by solving."""
    d = 12
    weight, hidden = random_weight(3, d).double(), hidden_states(40, d).double()
    second = hidden.T @ hidden / len(hidden)
    second += 0.01 * second.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    scale = weight.abs().amax(-1) / 7
    expected = torch.zeros_like(weight)
    for v in range(3):
        row = weight[v].clone()
        for i in range(d):
            expected[v, i] = (row[i] / scale[v]).round().clamp(-8, 7)
            error = row[i] - expected[v, i] * scale[v]
            if i + 1 < d:  # minimises x^T H x with x_i = -error, without changing earlier inputs
                rest = second[i + 1 :, i + 1 :]
                row[i + 1 :] += error * torch.linalg.solve(rest, second[i + 1 :, i])
    got = round_with_feedback(
        weight.float(), scale.float()[:, None], feedback_factor(hidden), FORMATS["int4"].round
    )
    assert torch.equal(got.double(), expected)


def test_the_names_are_those_of_the_command_line():
    assert tuple(FORMATS) == FORMAT_NAMES


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
    for bad, kind, text in (
        ([1.0], TypeError, "calibration must be floating-point hidden states, got list"),
        (torch.ones(3, 128).int(), TypeError, r"got torch\.int32"),
        (torch.ones(3, 64), ValueError, r"calibration must be \(\.\.\., 128\) and not empty"),
        (torch.ones(0, 128), ValueError, "and not empty"),
        (torch.full((2, 128), torch.inf), ValueError, "calibration must be finite"),
    ):
        with pytest.raises(kind, match=text):
            quantize(torch.zeros(2, 128), "int8", bad)
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
    """A plain float64 head with the dequantised weights of ``head``."""
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
    assert cast.hidden_dtype == torch.bfloat16 and cast.gate.out_weight.dtype == torch.bfloat16
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


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_format_is_refused(name):
    """copy_ would convert weights to small integers, or small integers to weights."""
    plain, head = make_head(), make_head().quantize(name)
    for target, source in ((plain, head), (head, plain), (head, make_head().quantize("int4"))):
        if name == "int4" and source.quantized == target.quantized:
            continue
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(RuntimeError, match=r"lm_head.weight is in .*, the head in"):
            target.load_state_dict(source.state_dict(), strict=False)
        for n, value in target.state_dict().items():
            assert torch.equal(value.view(torch.uint8), before[n].view(torch.uint8)), n


def test_calibrated_heads_decode_their_numbers():
    head, hidden = make_head(), hidden_states(300, 256) / 8
    calibrated = copy.deepcopy(head).quantize("int4", calibration=hidden)
    expected = quantize(head.reward_head.weight, "int4", hidden)
    assert torch.equal(calibrated.reward_head.weight, expected[0])
    assert not torch.equal(calibrated.lm_weight, copy.deepcopy(head).quantize("int4").lm_weight)
    before = head.state_dict()
    with pytest.raises(ValueError, match="calibration must be finite"):
        head.quantize("int4", calibration=hidden * torch.nan)
    assert head.quantized is None and head.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_lm_heads_rows_stand_in_for_hidden_states(name):
    """Only int4 needs them. A row that is not finite is left out."""
    head = make_head()
    with torch.no_grad():
        head.lm_head.weight[3, 5] = torch.nan
    rows = head.lm_weight[[v for v in range(len(head.lm_weight)) if v != 3]].clone()
    expected = [
        quantize(w, name, rows if name == "int4" else None)
        for w in (head.lm_weight, head.reward_head.weight)
    ]
    head.quantize(name)
    for got, (q, scale) in zip(
        ((head.lm_weight, head.lm_scale), (head.reward_head.weight, head.reward_head.weight_scale)),
        expected,
        strict=True,
    ):
        assert torch.equal(got[0].view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(got[1].nan_to_num(7), scale.nan_to_num(7))
    assert head.lm_scale[3].isnan().any() and torch.isfinite(head.lm_scale[4:]).all()


def test_rows_of_a_large_vocabulary_are_thinned_out():
    assert torch.equal(
        stand_ins(torch.arange(70000.0)[:, None], "int4")[:, 0], torch.arange(0, 70000.0, 3)
    )
    assert stand_ins(torch.full((3, 128), torch.nan), "int4") is None


def test_a_shared_lm_head_keeps_its_weights():
    linear = torch.nn.Linear(128, 9, bias=False)
    before = linear.weight.detach().clone()
    head = DualHead.from_lm_head(linear).quantize("int8")
    assert head.lm_weight.dtype == torch.int8
    assert torch.equal(linear.weight, before)
