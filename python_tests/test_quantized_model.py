# SPDX-License-Identifier: Apache-2.0
"""Quantised heads inside a Hugging Face model: every way of generating, casts, copies, detaching,
files. What their numbers mean is tested in test_quantization.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, make_backbone, make_model, prompts

import dualhead_ext as dh
from dualhead_ext.quantization import FORMATS

NAMES = tuple(FORMATS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
WIDE = {"hidden_size": 128, "head_dim": 16}  # int4 needs a multiple of 128
load = dh.DualHeadForCausalLM.from_pretrained


def wide_model(family: str = "llama", seed: int = 0, **config):
    return make_model(family, seed, sizes=WIDE, **config)


def meaning(model):
    """A copy of a model whose plain heads have the values of the quantised ones' numbers."""
    plain = copy.deepcopy(model)
    head = plain.lm_head_module
    lm, reward = head.dequantized(), head.reward_head.dequantized()
    bias = head.reward_head.bias
    gate, config = head.gate, head.config
    plain = dh.DualHeadForCausalLM.from_backbone(
        dh.detach(plain, dequantize=True), **config.to_dict()
    )
    head = plain.lm_head_module
    with torch.no_grad():
        head.weight = torch.nn.Parameter(lm, requires_grad=False)  # also of a tied one
        head.reward_head.weight.copy_(reward)
        if bias is not None:
            head.reward_head.bias.copy_(bias)
    head.gate = gate
    return plain.eval()


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8))
        for n in a
    )


# --- generating -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_the_numbers_mean(family):
    model = make_model(family, num_objectives=2).quantize("int8")
    plain, batch = meaning(model), prompts()
    assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"fused": False},
        {"num_beams": 3},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"do_sample": True, "top_k": 7, "seeds": torch.arange(3)},
        {"max_kl": 0.01},
        {"strength": torch.tensor([0.0, 0.5, 2.0])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_generating(name, options):
    model, batch = wide_model(mix="probs").quantize(name), prompts()
    if "prompt_lookup_num_tokens" in options:
        batch = {n: value[:1] for n, value in batch.items()}
    options = GREEDY | options
    assert torch.equal(
        model.generate(**batch, **options), meaning(model).generate(**batch, **options)
    )


def test_assisted_by_the_plain_backbone():
    model, batch = wide_model().quantize("int4"), {n: v[:1] for n, v in prompts().items()}
    draft = make_backbone("llama", **WIDE)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=draft), expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps(name):
    """The whole forward as one graph without a break, as with plain heads."""
    model, batch = wide_model().quantize(name), prompts()
    tokens = model.generate(**batch, **GREEDY)
    torch._dynamo.reset()
    compiled = model.generate(
        **batch,
        **GREEDY,
        cache_implementation="static",
        compile_config=_eager_compiling(),
    )
    assert torch.equal(compiled, tokens)


def _eager_compiling():
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return config
