# SPDX-License-Identifier: Apache-2.0
"""generate() with each kind of key-value cache gives the same tokens. Other caches are refused."""

import copy

import pytest
import torch
from paper_decoding import NEW, slow_batch
from tiny_models import FAMILIES, VOCAB, first_row, make_backbone, make_model, prompts
from transformers import DynamicCache, StaticCache

GREEDY = {"max_new_tokens": NEW, "do_sample": False}
EVERY = pytest.mark.parametrize("family", FAMILIES)


@EVERY
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_every_way_of_caching_gives_the_same_tokens(family, options):
    model, batch = make_model(family), prompts()
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)


@EVERY
def test_a_static_cache_of_prompts_without_padding(family):
    """transformers may drop a mask of ones, and then makes the static cache's mask without it."""
    model, ids = make_model(family), prompts()["input_ids"].clamp(min=3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    static = {"cache_implementation": "static", "disable_compile": True}
    for fused in (True, False):
        assert torch.equal(model.generate(**batch, **GREEDY, **static, fused=fused), expected)


@EVERY
def test_beams_equal_beams_without_a_cache(family):
    model, batch = make_model(family), prompts()
    beams = {"num_beams": 4, "num_return_sequences": 2} | GREEDY
    cached = model.generate(**batch, **beams)
    assert torch.equal(cached, model.generate(**batch, **beams, use_cache=False))


@EVERY
def test_several_turns_with_ragged_second_turns(family):
    """Padding in the second turn leaves gaps in the cache."""
    model, first = make_model(family), prompts()
    second_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    second = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(9))
    if family == "lfm2-hybrid":  # a convolution does not skip the gaps
        first, second, second_mask = first_row(first), second[:1], second_mask[:1]
    one = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    answer_mask = torch.ones(len(second), NEW, dtype=torch.long)
    both = {
        "input_ids": torch.cat((one.sequences, second * second_mask), 1),
        "attention_mask": torch.cat((first["attention_mask"], answer_mask, second_mask), 1),
    }
    if "sliding_window" in FAMILIES[family][2]:  # the backbone's own window counts the gaps
        expected = model.generate(**both, **GREEDY, use_cache=False)[:, -NEW:]
    else:
        expected = slow_batch(model, both)
    two = model.generate(**both, **GREEDY, past_key_values=one.past_key_values)
    assert torch.equal(two[:, -NEW:], expected)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "family, backend",
    [(f, "aot_eager") for f in ("llama-tied", "mistral-sliding", "gemma3")]
    + [("llama-tied", "inductor")],
)
def test_compiled_static_cache(family, backend):
    model, batch = make_model(family), prompts()
    expected = model.generate(**batch, **GREEDY)
    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = model._prepare_static_cache(
        cache_implementation="static",
        batch_size=3,
        max_cache_len=32,
        prefill_chunk_size=None,
        model_kwargs={},
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for step in range(NEW):
            inputs = model.prepare_inputs_for_generation(
                ids,
                next_sequence_length=1 if step else None,
                past_key_values=cache,
                attention_mask=mask,
                position_ids=_positions({"attention_mask": mask}),
            )
            out = (compiled if step else model)(**inputs)
            ids = torch.cat((ids, out.logits[:, -1].argmax(-1, keepdim=True)), 1)
            mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
    assert torch.equal(ids, expected)
    assert cache.layers[-1].gate_cache.columns == 7 + NEW - 1


def test_a_static_cache_that_hides_its_length_is_refused():
    model = make_model("mistral-sliding")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="sliding layers only, so its length is unknown"):
        model(**prompts(), past_key_values=cache)


def _positions(batch):
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def test_a_lazy_cache_and_a_copy_of_a_prompts_cache():
    model, batch = make_model("llama"), prompts()
    expected = model.generate(**batch, **GREEDY)
    with torch.no_grad():
        cache = DynamicCache()
        prompt = {name: value[:, :-1] for name, value in batch.items()}
        model(**prompt, past_key_values=cache, position_ids=_positions(prompt))
    for _ in range(2):
        again = model.generate(**batch, **GREEDY, past_key_values=copy.deepcopy(cache))
        assert torch.equal(again, expected)


def test_a_cache_of_the_plain_backbone_is_refused():
    batch = first_row(prompts())
    cache = DynamicCache()
    make_backbone("llama")(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="7 positions that the gate has not seen"):
        make_model("llama")(input_ids=batch["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("count", [-2, torch.tensor(-2), 5], ids=["count", "tensor", "length"])
def test_crop_takes_what_every_transformers_passes(count):
    model, batch = make_model("llama"), prompts()
    cache = DynamicCache()
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    layer = cache.layers[-1]
    layer.crop(count)
    assert layer.get_seq_length() == 5 and isinstance(layer.get_seq_length(), int)
    layer.crop(0)
    assert layer.get_seq_length() == 5
