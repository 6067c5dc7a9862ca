# SPDX-License-Identifier: Apache-2.0
"""`generate()` with random models, controls per request and batches, against a slow plain loop.

The loop looks at each row alone, without padding and without a cache. Its logits come from the
formulas, in one pass of the backbone's decoder over the text. They must choose each token of the
text. A row in another batch must have the same text.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tiny_models import FAMILIES, VOCAB, make_model
from torch import Tensor

from dualhead_ext import reference
from dualhead_ext.head.kl_cap import capped_alpha

CALLS = 8
# A cached step and a pass over the whole text round differently. Tokens that are closer to each
# other than this may swap places, and a value at the edge of a threshold or filter may cross it.
NEAR = 1e-4


def rewards(model: Any, hidden: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(z_LM, z_RM) before f, (T, V) each; weights: (K,) or None."""
    head = model.lm_head_module
    reward, w_lm = head.reward_head, head.lm_weight
    z_lm = reference.head_logits(hidden, w_lm, head.lm_bias)
    count = model.dual_head_config.num_objectives
    weights = torch.full((count,), 1 / count) if weights is None else weights
    z_rm = torch.zeros_like(z_lm)
    for k, weight in enumerate(weights):
        if reward.kind == "full":
            z = hidden @ reward.weight[k].T
            z = z if reward.bias is None else z + reward.bias[k]
            z_rm += weight * z
            continue
        down = hidden @ reward.down.weight[k].T
        delta = down @ reward.up.weight[k].T + reward.bias[k]
        z_rm += weight * (delta @ w_lm.T if reward.kind == "embedding" else delta)
    return z_lm, z_rm if reward.kind == "full" else z_lm + z_rm


def gate_logits(model: Any, hidden: Tensor) -> Tensor:
    gate = model.lm_head_module.gate
    if model.dual_head_config.gate != "attention":
        return gate(hidden)
    projections = (getattr(gate, f"{name}_weight") for name in "qkvo")
    return reference.attention_gate_logit(
        hidden[None], *projections, gate.out_weight, gate.out_bias, gate.num_heads
    )[0]


def slow_logits(model: Any, ids: Tensor, controls: dict[str, Any], nudge: float = 0.0) -> Tensor:
    """(T, V) logits after f for one text. nudge: how far skip_threshold is moved."""
    hidden = model.get_decoder()(input_ids=ids[None], use_cache=False)[0][0]
    config = model.dual_head_config
    post = (config.mix, config.logit_scale, config.logit_softcap)
    rest = {
        name: torch.tensor(value) for name, value in controls.items() if name != "objective_weights"
    }
    offset = rest.pop("gate_offset", None)
    logit = gate_logits(model, hidden)
    logit = logit if offset is None else logit + offset
    cap = rest.pop("max_kl", None)
    if "skip_threshold" in rest:
        rest["skip_threshold"] = rest["skip_threshold"] + nudge
    alpha = reference.mixing_weight(logit, **rest, mix=config.mix)
    z_lm, z_rm = rewards(model, hidden, controls.get("objective_weights"))
    if cap is not None:
        alpha = capped_alpha(z_lm[None], z_rm[None], alpha[None], cap[None], *post)[0]
    return reference.mix_logits(z_lm, z_rm, alpha, *post)


def chosen(logits: Tensor, filters: dict[str, float], seed: int | None, nudge: float) -> Tensor:
    """(T, V) scores for T tokens in sequence. The token with the largest score is chosen."""
    if seed is None:
        return logits
    scaled = logits / filters.get("temperature", 1.0)
    count = len(logits)
    edges = {
        "top_k": torch.full((count,), filters["top_k"], dtype=torch.int32),
        "top_p": torch.full((count,), filters.get("top_p", 1.0) * (1 + nudge)),
        "min_p": torch.full((count,), filters.get("min_p", 0.0) * (1 + nudge)),
    }
    uniform = reference.philox_uniform(torch.full((count,), seed), torch.arange(count), VOCAB)
    noise = -torch.log(-torch.log1p(-uniform))
    return (scaled + noise).masked_fill(~reference.keep_mask(scaled, **edges), -torch.inf)


def assert_chosen(model, prompt, text, controls, filters, seed) -> None:
    """Check that each token is the one that the slow loop chooses, or as good up to rounding."""
    ids, start = torch.cat((prompt, text)), len(prompt) - 1
    good = torch.zeros(len(text), dtype=torch.bool)
    for nudge in (0.0, NEAR, -NEAR):
        logits = slow_logits(model, ids, controls, nudge)[start:-1]
        scores = chosen(logits, filters, seed, nudge)
        best = scores.max(-1).values
        good |= scores.gather(1, text[:, None])[:, 0] >= best - NEAR * best.abs().clamp(min=1)
        if bool(good.all()):
            return
    wrong = (~good).nonzero().flatten().tolist()
    raise AssertionError(f"tokens {wrong} of {text.tolist()} after {prompt.tolist()}")


def random_model(rng: random.Random) -> Any:
    kind = rng.choice(["full", "embedding", "lowrank"])
    return make_model(
        rng.choice(list(FAMILIES)),
        seed=rng.randrange(1000),
        gate=rng.choice(["attention", "attention", "linear"]),
        mix=rng.choice(["logits", "probs"]),
        reward_head=kind,
        num_objectives=rng.choice([1, 1, 3]),
        **({} if kind == "full" else {"reward_rank": rng.choice([1, 4])}),
    )


def random_controls(rng: random.Random, count: int) -> dict[str, Any]:
    """All controls of one request, as numbers."""
    return {
        "strength": rng.choice([0.0, 0.5, 1.0, rng.uniform(0, 4)]),
        "gate_offset": rng.uniform(-3, 3),
        "alpha": rng.choice([0.0, 1.0, rng.random()]),
        "max_kl": rng.choice([0.0, rng.uniform(0, 2), float("inf")]),
        "skip_threshold": rng.choice([0.0, rng.uniform(0, 0.5)]),
        "objective_weights": torch.tensor([rng.uniform(-1, 2) for _ in range(count)]),
    }


def random_filters(rng: random.Random) -> dict[str, float]:
    filters: dict[str, float] = {"top_k": rng.choice([0, 0, 1, 7, VOCAB])}
    for name, value in (
        ("temperature", rng.uniform(0.3, 2)),
        ("top_p", rng.uniform(0.05, 1)),
        ("min_p", rng.uniform(0, 0.5)),
    ):
        filters |= {name: value} if rng.random() < 0.4 else {}
    return filters


def batch_of(requests: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Arguments of `generate()`: prompts padded on the left, and one row of controls per prompt."""
    width = max(len(request["prompt"]) for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request["prompt"]) :] = request["prompt"]
        mask[row, width - len(request["prompt"]) :] = 1
    values = {name: [request["controls"][name] for request in requests] for name in names}
    if "objective_weights" in values:
        values["objective_weights"] = torch.stack(values["objective_weights"])
    return {"input_ids": ids, "attention_mask": mask, **values}


@torch.no_grad()
def test_texts_are_those_of_a_slow_loop_in_any_batch(seed):
    rng, tokens = random.Random(seed), 0
    for call in range(CALLS):
        model = random_model(rng)
        names = rng.sample(["strength", "gate_offset", "alpha", "max_kl", "skip_threshold",
                            "objective_weights"], rng.randint(0, 4))  # fmt: skip
        sampled, filters = rng.random() < 0.5, random_filters(rng)
        requests = [
            {
                "prompt": torch.tensor([rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 9))]),
                "seed": rng.randrange(-(2**63), 2**63),
                "controls": random_controls(rng, model.dual_head_config.num_objectives),
            }
            for _ in range(rng.randint(1, 5))
        ]
        options = {"max_new_tokens": rng.randint(1, 8), "do_sample": sampled}
        options |= filters if sampled else {}
        options |= {"fused": False} if not sampled and rng.random() < 0.3 else {}
        told = f"call {call}: {model.dual_head_config} {names} {options} {requests}"
        batches = [requests, rng.sample(requests, len(requests)), rng.sample(requests, 1)]
        texts: dict[int, Tensor] = {}
        for batch in batches:
            arguments = batch_of(batch, names)
            if sampled:
                options["seeds"] = torch.tensor([request["seed"] for request in batch])
            new = model.generate(**arguments, **options)[:, arguments["input_ids"].shape[1] :]
            for request, text in zip(batch, new, strict=True):
                if torch.equal(texts.setdefault(id(request), text), text) and batch is not requests:
                    continue
                controls = {name: request["controls"][name] for name in names}
                try:
                    assert_chosen(
                        model,
                        request["prompt"],
                        text,
                        controls,
                        filters,
                        request["seed"] if sampled else None,
                    )
                except AssertionError as error:
                    raise AssertionError(f"{told}\n{request}: {error}") from None
                tokens += len(text)
    assert tokens > CALLS * 3
