# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching with a gated head.

Each request must have the text that `generate()` writes for it alone.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import VOCAB, make_model
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from dualhead_ext.model import continuous_batching

NEW = 8
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
LENGTHS = (5, 17, 1, 30, 9)
# Full, sliding and alternating attention; tied, scaled and capped logits.
FAMILY_OF_EACH_KIND = ("llama-tied", "gpt2", "mistral-sliding", "gemma2-softcap", "granite-scale")
SUPPORTED = Version(transformers.__version__) >= Version(continuous_batching.OLDEST)
supported = pytest.mark.skipif(not SUPPORTED, reason="needs transformers 5.23")


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def batching(**options):
    """Chunks of 16 positions, pages of 4: prompts are split, and batches mix them with decoding."""
    sizes = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16}
    return ContinuousBatchingConfig(**sizes | options)


def alone(model, prompt, **controls):
    ids = torch.tensor([prompt])
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **controls)[0].tolist()


def batched(model, inputs, config=None, **controls):
    found = model.generate_batch(inputs, GREEDY, config or batching(), **controls)
    assert not [out.error for out in found.values() if out.error]
    return [out.prompt_ids + out.generated_tokens for out in found.values()]


def check(model, inputs=None, config=None, **controls):
    """Compare with `generate()`. controls: one value for each prompt."""
    inputs = inputs or prompts()
    rows = [{name: value[i] for name, value in controls.items()} for i in range(len(inputs))]
    expected = [alone(model, ids, **own) for ids, own in zip(inputs, rows, strict=True)]
    assert len({token for text in expected for token in text[-NEW:]}) > 3
    assert batched(model, inputs, config, **controls) == expected


SCALED = {"strength": [1.0, 0.0, 2.0, 1.0, 1.5], "gate_offset": [0.0, 0.0, -1.0, 2.0, 0.0]}
FIXED = {"alpha": [0.1, 0.5, 1.0, 0.0, 0.9]}
CAPPED = {
    "max_kl": [0.1, 0.5, 1.0, 0.0, 0.9],
    "objective_weights": [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [2.0, -1.0], [0.3, 0.7]],
}


@pytest.mark.quick_cases(2)
@supported
@pytest.mark.parametrize("family", FAMILY_OF_EACH_KIND)
def test_families(family):
    check(make_model(family), **SCALED)


@pytest.mark.quick_cases(3)
@supported
@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
@pytest.mark.parametrize(
    ("reward_head", "mix", "controls"),
    [("full", "logits", CAPPED), ("embedding", "probs", FIXED), ("lowrank", "logits", SCALED)],
)
def test_every_gate_and_reward_head(gate, reward_head, mix, controls):
    model = make_model("llama", gate=gate, reward_head=reward_head, mix=mix, num_objectives=2)
    check(model, **controls)


@supported
def test_paged_eager_attention_and_a_wide_gate():
    # The gate's state needs three layers of the tiny backbone's cache.
    model = make_model("llama", gate_num_heads=4, gate_head_dim=20)
    model.set_attn_implementation("eager")
    check(model, **SCALED)
    assert model.config._attn_implementation == "eager"


@supported
def test_bfloat16_keeps_the_folded_values_in_fp32():
    model = make_model("llama").bfloat16()
    text = batched(model, prompts()[:1], strength=1.0)[0]
    manager_alpha = model.lm_head_module.last_alpha[0, 0]
    model(torch.tensor([text[:-1]]))
    # The backbone rounds equally on both sides. Folded values in bf16 would change alpha by 1e-3.
    torch.testing.assert_close(
        manager_alpha, model.lm_head_module.last_alpha[0, -1], rtol=0, atol=2e-3
    )


@supported
def test_quantized_heads():
    model = make_model("llama")
    model.quantize("int8")
    check(model, **FIXED)


@supported
def test_a_request_without_a_control_keeps_its_own_gate():
    model, inputs = make_model("llama"), prompts()
    given = [{"alpha": 0.9}, {}, {"max_kl": 0.05}, {"strength": 0.0}, {"gate_offset": 3.0}]
    expected = [alone(model, ids, **own) for ids, own in zip(inputs, given, strict=True)]
    context = model.continuous_batching_context_manager(
        GREEDY, continuous_batching_config=batching()
    )
    with context as manager:
        names = [
            manager.add_request(ids, eos_token_id=-1, **own)
            for ids, own in zip(inputs, given, strict=True)
        ]
        for wrong, error in (
            ({"strength": -1.0}, ValueError),
            ({"alpha": "much"}, TypeError),
            ({"objective_weights": [1.0, 2.0]}, ValueError),
        ):
            with pytest.raises(error, match=f"add_request: {next(iter(wrong))} must"):
                manager.add_request([1, 2], **wrong)
        misspelt = manager.add_request([1, 2], strenght=1.0)
        found = {}
        while len(found) < len(inputs) + 1:
            if (result := manager.get_result(timeout=60)) is not None:
                found[result.request_id] = result
    assert "strenght" in found.pop(misspelt).error
    texts = [found[name].prompt_ids + found[name].generated_tokens for name in names]
    assert texts == expected


@supported
def test_shared_prefixes_and_forks():
    model = make_model("llama")
    start = prompts()[3]
    inputs = [start, [*start, 7], [*start[:20], 9], prompts()[1]]
    controls = {"strength": [1.0, 2.0, 0.0, 1.5]}
    check(model, inputs, **controls)
    twice = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, top_k=1, eos_token_id=-1, num_return_sequences=2
    )
    found = model.generate_batch(inputs, twice, batching(), **controls)
    texts = [out.generated_tokens for out in found.values()]
    assert texts[::2] == texts[1::2] == [text[-NEW:] for text in batched(model, inputs, **controls)]


@supported
def test_a_cache_too_small_for_all(monkeypatch):
    offloaded, plain = [], OffloadingManager.offload_requests

    def counting(self):
        offloaded.append(len(self.scheduler.starved_requests))
        return plain(self)

    monkeypatch.setattr(OffloadingManager, "offload_requests", counting)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randint(3, VOCAB, (4, 12), generator=generator).tolist()
    # The cache has room for all four prompts, but not for their texts: a request is offloaded and
    # restarted.
    config = batching(num_blocks=16, safety_margin=0.0)
    check(make_model("llama"), inputs, config, strength=[1.0, 2.0, 0.0, 1.5])
    assert any(offloaded)


@supported
def test_a_kept_manager_follows_the_weights():
    model, inputs = make_model("llama"), prompts()[1:4]
    before = [alone(model, ids) for ids in inputs]
    kept = {"persistent_manager": True}
    assert batched(model, inputs, **kept) == before
    manager = model._cached_continuous_batching_manager
    cache = manager.batch_processor.cache
    assert batched(model, inputs, **kept) == before
    assert manager.batch_processor.cache is cache
    with torch.no_grad():
        model.lm_head_module.gate.k_weight.mul_(-2.0)
        model.lm_head_module.gate.out_weight.mul_(-40.0)
    after = [alone(model, ids) for ids in inputs]
    assert after != before
    assert batched(model, inputs, **kept) == after
    model.destroy_cached_continuous_batching_manager()


@supported
def test_generate_with_a_paged_cache():
    model, ids = make_model("llama"), torch.tensor([prompts()[0], prompts()[4][:5]])
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, strength=torch.tensor([2.0, 0.0]), **options)
    options["cache_implementation"] = "paged"
    # By default the sizes depend on the machine's memory.
    options["continuous_batching_config"] = batching()
    found = model.generate(ids, strength=torch.tensor([2.0, 0.0]), **options)
    assert torch.equal(found[0], expected)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="generate_batch: inputs must hold no padding"):
        model.generate(ids, attention_mask=mask, **options)
    with pytest.raises(ValueError, match="fused decoding loop, which cache_implementation"):
        model.generate(ids, fused=True, **options)


@supported
@pytest.mark.parametrize(
    "option", [{"use_cuda_graph": True}, {"use_async_batching": True}, {"default_compile_level": 1}]
)
def test_what_needs_the_device_alone_is_refused(option):
    model = make_model("llama")
    with pytest.raises(NotImplementedError, match=f"{next(iter(option))} is not supported"):
        model.generate_batch([[1, 2]], GREEDY, batching(**option))
    with pytest.raises(ValueError, match=r"generate_batch: strength must be \(1,\)"):
        model.generate_batch([[1, 2]], GREEDY, batching(), strength=[1.0, 2.0])


@supported
def test_another_manager_is_refused():
    model = make_model("llama")
    manager = ContinuousBatchingManager(model, GREEDY, batching())
    manager.start()
    manager.add_request([1, 2, 3])
    result = manager.get_result(timeout=60)
    assert "packed input, which the gated head does not decode" in result.error
    manager.stop(hard_stop=True)


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(continuous_batching, "OLDEST", "99.0")
    # generate_batch is not called here: if it were not refused, its cache would take most of the
    # machine's memory.
    with pytest.raises(NotImplementedError, match=r"needs transformers 99\.0 or newer, got"):
        continuous_batching.batching_config(None)
