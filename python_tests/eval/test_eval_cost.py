# SPDX-License-Identifier: Apache-2.0
"""Costs, against independent counts.

FLOPs are compared with torch's own counter, the passes of each decoder with a count by hand, and
bytes and parameters with sums over tensors.
"""

import copy

import pytest
import torch
from test_decoding import make_reward_model
from tiny_models import VOCAB, make_backbone, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen3Config

import dualhead_ext as dh
from dualhead_ext.eval import cost, decoding

NEW, LENGTH = 5, 7
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def counted(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("context", [1, 6, 17])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        LlamaConfig(**{**SHAPE, "head_dim": None}),
        MistralConfig(**SHAPE, sliding_window=5),
        Qwen3Config(**SHAPE),
    ],
    ids=["llama", "llama-head-dim", "mistral-sliding", "qwen3"],
)
def test_backbone_flops_are_torchs(config, context):
    """One token with a cache and eager attention. torch counts only products of matrices."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    if context > 1:
        model(torch.ones(1, context - 1, dtype=torch.long), past_key_values=cache)
    total = counted(lambda: model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache))
    # If transformers computes the angles of the rotary embedding by a product, torch counts it.
    rotation = 2 * model.model.rotary_emb.inv_freq.numel()
    ours = cost.flops_per_token(config, context)
    assert total - ours in (0, rotation)
    head = 2 * config.hidden_size * config.vocab_size
    assert cost.flops_per_token(config, context, lm_head=False) == ours - head


@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
@pytest.mark.parametrize("objectives", [1, 3])
def test_head_flops_are_torchs(gate, objectives):
    """In float64 the step runs in eager PyTorch, so that torch sees its products."""
    config = LlamaConfig(**SHAPE)
    sizes = {"hidden_size": 24, "vocab_size": 61, "gate_num_heads": 2, "gate_head_dim": 6}
    head_config = dh.DualHeadConfig(**sizes, gate=gate, num_objectives=objectives)
    head, context = dh.DualHead(head_config).double(), 9
    cache = head.new_cache(1, context)
    head.prefill(torch.randn(1, context - 1, 24).double(), cache)
    total = counted(lambda: head.step(torch.randn(1, 24).double(), cache))
    lm_head = 2 * 24 * 61
    # Eager PyTorch does not compute these two as products of matrices: the sum of p u over
    # positions and heads, and w.h of the linear gate, which is summed in the same order for every
    # batch.
    unseen = {"attention": 2 * context * 2, "linear": 2 * 24, "fixed": 0}[gate]
    ours = cost.flops_per_token(config, context, head_config) - cost.flops_per_token(
        config, context
    )
    assert ours == total - lm_head + unseen


def test_flops_of_other_families_are_refused():
    with pytest.raises(NotImplementedError, match=r"config must be of llama, .* got gpt2"):
        cost.flops_per_token(make_backbone("gpt2").config, 3)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        cost.flops_per_token(LlamaConfig(**SHAPE), 0)


# --- passes ---------------------------------------------------------------------------------------


def systems():
    base, arm, rm = make_backbone("llama"), make_backbone("llama", seed=7), make_reward_model()
    gated, k = make_model("llama"), 4
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def reward(ids, mask):
        return decoding.sequence_rewards(rm, ids, mask)

    n = {"reward": reward, "n": 3, "pad_token_id": 0, "do_sample": True}
    calls = {
        "backbone": (lambda i: decoding.plain(base, i, **options), [base]),
        "gated": (lambda i: decoding.plain(gated, i, **options), [gated]),
        "genarm": (
            lambda i: decoding.genarm(base, i, reward_models=[arm], strengths=[1.0], **options),
            [base, arm],
        ),
        "args": (lambda i: decoding.args(base, i, reward_model=rm, k=k, **options), [base, rm]),
        "best_of_n": (lambda i: decoding.best_of_n(base, i, **options | n), [base, rm]),
    }
    return {name: cost.System(*call) for name, call in calls.items()}


def prompts(count):
    return torch.randint(3, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def test_passes_memory_and_parameters_of_each_decoder():
    table = systems()
    found = cost.measure(table, prompts(3), NEW, batch_sizes=(1, 3), seconds=0.0, min_rounds=2)
    text = LENGTH + NEW - 1
    passes = {
        "backbone": 1.0,
        "gated": 1.0,
        "genarm": 2.0,
        "args": 2.0 + 4 * NEW / text,
        "best_of_n": 3.0 + 3 * (text + 1) / text,
    }
    forwards = dict.fromkeys(passes, 1.0) | {"genarm": 2.0, "args": 2.0, "best_of_n": 1 + 1 / NEW}
    for name, costs in found.items():
        assert [row.batch_size for row in costs] == [1, 3]
        for row in costs:
            assert row.passes == pytest.approx(passes[name]), name
            assert row.forwards == pytest.approx(forwards[name]), name
            assert row.memory == cost.COUNTED and row.row()["memory_bytes"] == row.memory_bytes
            took = row.timing.us_median / 1e6
            assert row.tokens_per_s == pytest.approx(row.batch_size * NEW / took)
            assert row.ms_per_token == pytest.approx(took * 1000 / NEW)
    assert not table["gated"].models[0].model._forward_hooks.keys() - {
        table["gated"].models[0].lm_head_module.decoder_hook.id
    }


def test_memory_on_the_cpu_is_what_is_held():
    base, gated = make_backbone("llama"), make_model("llama")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    table = {
        name: cost.System(lambda i, m=model: decoding.plain(m, i, **options), [model])
        for name, model in (("backbone", base), ("gated", gated))
    }
    found = cost.measure(table, prompts(2), NEW, batch_sizes=(2,), seconds=0.0, min_rounds=2)
    config = base.config
    keys = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    keys *= LENGTH + NEW - 1  # both caches end one token short: the last token is not an input
    weights = sum(t.numel() * t.element_size() for t in (*base.parameters(), *base.buffers()))
    assert found["backbone"][0].memory_bytes == weights + keys
    head = gated.lm_head_module
    added = sum(p.numel() * 4 for p in (*head.reward_head.parameters(), *head.gate.parameters()))
    columns, (heads, size) = 64, (head.gate.num_heads, head.gate.head_dim)
    # For k, u and validity, then for the length
    layer = 2 * (columns * (heads * size * 4 + heads * 4 + 1) + 4)
    more = found["gated"][0].memory_bytes - found["backbone"][0].memory_bytes - added - layer
    assert 0 <= more <= 64  # the draw counter and similar small tensors


def test_parameters_count_once():
    tied, gated = make_backbone("llama-tied"), make_model("llama-tied")
    own = sum(p.numel() for p in tied.parameters())
    assert cost.parameter_counts([tied]) == (own, own)
    head = gated.lm_head_module
    added = sum(p.numel() for p in (*head.reward_head.parameters(), *head.gate.parameters()))
    assert cost.parameter_counts([gated]) == (added, own + added)
    assert cost.parameter_counts([gated, gated]) == (added, own + added)
    assert cost.parameter_counts([tied, copy.deepcopy(tied)]) == (2 * own, 2 * own)
    assert cost.weight_bytes([tied, tied]) == cost.weight_bytes([tied])


def test_what_is_refused():
    base = make_backbone("llama")
    short = cost.System(lambda i: decoding.plain(base, i, max_new_tokens=2), [base])
    with pytest.raises(RuntimeError, match=r"short must write \(1, 12\), got \(1, 9\)"):
        cost.measure({"short": short}, prompts(1), NEW, batch_sizes=(1,))
    with pytest.raises(ValueError, match="prompts must be at least 8, got 1"):
        cost.measure({"short": short}, prompts(1), NEW, batch_sizes=(1, 8))
