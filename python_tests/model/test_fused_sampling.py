# SPDX-License-Identifier: Apache-2.0
"""Sampling in the fused decoding loop of generate(): its distribution and its seeds."""

from __future__ import annotations

import copy

import pytest
import torch
from sampling_cases import assert_distribution, filtered_probabilities
from tiny_models import make_model, prompts

NEW = 6
SAMPLED = {"max_new_tokens": NEW, "do_sample": True}

FILTERS = {
    "none": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top_k": {"top_k": 4},
    "all": {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
}


def pair_probabilities(model, row, filters, kept=12):
    """Probabilities of the first two tokens in float64.

    Returns (V,) for the first token and, for each of the likeliest first tokens, (V,) for the
    second.
    """

    def after(ids):
        with torch.no_grad():
            return filtered_probabilities(model(ids).logits[0, -1], **filters)

    first = after(row)
    likely = first.topk(kept).indices
    likely = likely[first[likely] > 0]
    return first, {int(v): after(torch.cat((row, v.view(1, 1)), 1)) for v in likely}


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "ordinary"])
def test_the_distribution_of_both_loops(filters, fused):
    """The first token comes from the prompt's logits, the second from the step."""
    model = make_model("llama")
    row = prompts()["input_ids"][:1]
    options = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 20000}
    tokens = model.generate(row, **options, **filters, fused=fused)[:, -2:]
    first, second = pair_probabilities(model, row, filters)
    assert_distribution(tokens[:, 0], first)
    for v, expected in second.items():
        followers = tokens[tokens[:, 0] == v, 1]
        if len(followers) > 200:
            assert_distribution(followers, expected)


def test_sampling_is_the_global_generators():
    model, batch = make_model("llama"), prompts()
    texts = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        torch.manual_seed(seed)
        texts[name] = model.generate(**batch, **SAMPLED, fused=True)
    texts["next"] = model.generate(**batch, **SAMPLED, fused=True)
    assert torch.equal(texts["first"], texts["again"])
    assert not torch.equal(texts["first"], texts["other"])
    assert not torch.equal(texts["other"], texts["next"]), "the generator goes on"


def test_sampling_by_a_generator_and_by_seeds():
    model, batch = make_model("llama"), prompts()
    by_generator = [
        model.generate(**batch, **SAMPLED, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(by_generator[0], by_generator[1])
    assert not torch.equal(by_generator[0], by_generator[2])
    seeds = torch.tensor([11, 12, 13])
    together = model.generate(**batch, **SAMPLED, seeds=seeds)
    assert torch.equal(together, model.generate(**batch, **SAMPLED, seeds=seeds))
    order = [2, 0, 1]  # a row's text does not depend on its position in the batch
    moved = {name: value[order] for name, value in batch.items()}
    assert torch.equal(model.generate(**moved, **SAMPLED, seeds=seeds[order]), together[order])


def test_copies_of_a_request_draw_from_seeds_of_their_own():
    model, batch = make_model("llama"), prompts()
    options = SAMPLED | {"num_return_sequences": 3, "seeds": torch.tensor([5, 50, 500])}
    texts = model.generate(**batch, **options)[:, -NEW:]
    assert len({tuple(text.tolist()) for text in texts}) == 9
    alone = model.generate(**batch, **SAMPLED, seeds=torch.tensor([6, 51, 501]))
    assert torch.equal(texts[1::3], alone[:, -NEW:])


def test_a_second_turn_draws_anew():
    """Copies of one cache, as for several answers to one prompt, must not give the same text."""
    model, batch = make_model("llama"), prompts()
    one = model.generate(**batch, **SAMPLED, return_dict_in_generate=True)
    more = torch.cat((one.sequences, one.sequences[:, :1]), 1)
    ones = torch.ones(3, NEW + 1, dtype=torch.long)
    mask = torch.cat((batch["attention_mask"], ones), 1)
    texts = [
        model.generate(
            more, attention_mask=mask, past_key_values=copy.deepcopy(one.past_key_values), **SAMPLED
        )
        for _ in range(2)
    ]
    assert not torch.equal(*texts)
