# SPDX-License-Identifier: Apache-2.0
"""A prompt's keys and folded values from one GEMM.

torch has this GEMM for CUDA only. These tests give the CPU an equally exact one.
"""

from __future__ import annotations

import pytest
import torch

import dualhead_ext as dh
from dualhead_ext.head.prompt_projection import PromptProjection

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def products(monkeypatch):
    """Shapes of the products computed by mm.dtype, on the CPU."""
    seen = []

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype and a.dtype in HALVES and out_dtype == torch.float32
        seen.append((*a.shape, b.shape[1]))
        return a.float() @ b.float()

    monkeypatch.setattr(PromptProjection, "applies", staticmethod(lambda w: w.dtype in HALVES))
    registered = torch.library.Library("aten", "IMPL")
    registered.impl("mm.dtype", mm, "CPU")
    yield seen
    registered._destroy()


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e4])
def test_three_terms_sum_to_the_folded_rows(dtype, scale, seed):
    """Their sum is exact in fp32, for rows whose values are within a factor 2^14 of the largest."""
    generator = torch.Generator().manual_seed(seed)
    u_weight = scale * (torch.rand(5, 40, generator=generator) + 1e-4)
    u_weight[2], u_weight[3, ::2] = 0, -u_weight[3, ::2]
    projection = PromptProjection(torch.zeros(7, 40, dtype=dtype), u_weight)
    assert projection.weight.dtype == dtype and projection.weight.shape == (7 + 3 * 5, 40)
    terms = projection.weight[7:].double().unflatten(0, (3, 5))
    assert torch.equal((terms.sum(0) * projection.unit[:, None].double()).float(), u_weight)


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_keys_and_values_are_those_of_two_products(products, dtype, seed):
    torch.manual_seed(seed)
    config = dh.DualHeadConfig(hidden_size=96, vocab_size=50, gate_num_heads=3, gate_head_dim=8)
    head = dh.DualHead(config).to(dtype)
    torch.nn.init.normal_(head.gate.out_weight)
    hidden = torch.randn(2, 11, 96).to(dtype)
    weights = head.new_cache(2, 16).weights
    u_weight = weights.tensors["u_weight"]
    k, u = head.gate.keys_and_values(hidden, u_weight, weights.projection)
    assert products == [(22, 96, 24 + 3 * 3)]
    exact = head.double().gate
    expected_k, expected_u = exact.keys_and_values(hidden.double(), u_weight.double(), None)
    assert k.dtype == dtype and k.shape == (2, 3, 11, 8) and u.shape == (2, 3, 11)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(k.double(), expected_k, rtol=0.51 * rounding, atol=1e-5)
    torch.testing.assert_close(u.double(), expected_u, rtol=1e-5, atol=1e-5)


def test_prefill_uses_the_projection_with_equal_results(products, seed):
    torch.manual_seed(seed)
    head = dh.DualHead(dh.DualHeadConfig(hidden_size=64, vocab_size=50)).bfloat16()
    torch.nn.init.normal_(head.gate.out_weight)
    hidden = torch.randn(3, 9, 64).bfloat16()
    cache = head.new_cache(3, 16)
    assert cache.weights.projection is not None
    out = head.prefill(hidden, cache, logits_to_keep=0)
    assert len(products) == 1
    plain = head.new_cache(3, 16)
    plain.weights.projection = None
    expected = head.prefill(hidden, plain, logits_to_keep=0)
    assert len(products) == 1
    torch.testing.assert_close(out.alpha, expected.alpha, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(cache.u[..., :9], plain.u[..., :9], rtol=1e-5, atol=1e-5)


def test_it_is_for_cuda_in_16_bits():
    assert not PromptProjection.applies(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert (
        dh.DualHead(dh.DualHeadConfig(hidden_size=64, vocab_size=9))
        .new_cache(1, 4)
        .weights.projection
        is None
    )
