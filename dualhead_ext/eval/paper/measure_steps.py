# SPDX-License-Identifier: Apache-2.0
"""Steps for figures that need no generated text: likelihoods of given texts, gate statistics, and
cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model.causal_lm import DualHeadForCausalLM
from .. import cost as costs
from ..likelihood import (
    PairAccuracy,
    Text,
    accuracy_of,
    make_texts,
    of_model,
    of_reward_head,
    perplexity,
    token_kl,
    token_log_probs,
    token_mean,
    truthfulqa,
)
from .cells import Cell, Store
from .decode_steps import folders_of, reward_scores
from .running import Running, device, open_system
from .trained import load_policy

ALPHA_BINS = 20
_ALPHA_EDGE = 0.01  # as in the trainer's alarm for a collapsed gate


def _open(cell: Cell, store: Store) -> Running:
    o = cell.options
    return open_system(o["decoder"], folders_of(cell, store), o["decoder_options"], "float32")


def likelihood(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """On test pairs: perplexity of the chosen responses, their KL from the backbone per token, how
    often the chosen response is likelier; for a gated head, also by the reward head alone.
    """
    running, o = _open(cell, store), cell.options
    rows = store.data.test_pairs(o["count"])
    backbone = load_policy(store.folder(cell.needs["backbone"])).to(device())
    chosen, rejected = (
        make_texts(((row["prompt"], row[side]) for row in rows), running.tokenizer, o["max_length"])
        for side in ("chosen", "rejected")
    )
    system, model = running.distribution, running.models[0]
    log_probs = token_log_probs(system, chosen)
    accuracy = _accuracy(log_probs, token_log_probs(system, rejected), rows)
    found = {
        "perplexity": list(perplexity(log_probs)),
        "kl": list(token_mean(token_kl(system, of_model(backbone), chosen))),
        "pair_accuracy": list(accuracy.accuracy),
        "longer_is_better": list(accuracy.longer),
    }
    if isinstance(model, DualHeadForCausalLM) and model.dual_head_config.num_objectives == 1:
        head = of_reward_head(model)
        by_head = (token_log_probs(head, side) for side in (chosen, rejected))
        found["reward_head"] = list(_accuracy(*by_head, rows).accuracy)
    return found


def _accuracy(chosen: list[Tensor], rejected: list[Tensor], rows: list) -> PairAccuracy:
    sums = ([float(values.sum()) for values in side] for side in (chosen, rejected))
    return accuracy_of(*sums, rows)


def judge_accuracy(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """How often a reward model scores the chosen response of test pairs higher, by subset."""
    o = cell.options
    rows = store.data.test_pairs(o["count"])
    sides = [[(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    scores = reward_scores(cell, store, [*sides[0], *sides[1]], o["max_length"])
    scored = list(zip(rows, scores[: len(rows)], scores[len(rows) :], strict=True))
    found = {"all": _wins(scored)}
    for subset in o["subsets"]:
        found[subset] = _wins([each for each in scored if each[0]["subset"] == subset])
    return found


def _wins(scored: list[tuple[dict[str, Any], float, float]]) -> dict[str, Any]:
    """Accuracy from (row, score of chosen, score of rejected)."""
    rows, chosen, rejected = zip(*scored, strict=True)
    found = accuracy_of(chosen, rejected, rows)
    return {
        "pairs": found.pairs,
        "accuracy": list(found.accuracy),
        "longer_is_better": list(found.longer),
    }


def answers(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """TruthfulQA's multiple choice."""
    running = _open(cell, store)
    questions = store.data.truthfulqa(cell.options["count"])
    found = truthfulqa(
        running.distribution, questions, running.tokenizer, cell.options["max_length"]
    )
    return {"mc1": list(found.mc1), "mc2": list(found.mc2), "questions": found.questions}


# --- the gate -------------------------------------------------------------------------------------


@torch.no_grad()
def gate(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """alpha over the chosen responses of test pairs: moments, shares at the ends, histogram, means
    by position, whole traces, and its correlation with the LM head's entropy.
    """
    running, o = _open(cell, store), cell.options
    rows = store.data.test_pairs(o["count"])
    chosen = make_texts(
        ((row["prompt"], row["chosen"]) for row in rows), running.tokenizer, o["max_length"]
    )
    traces = [_trace(running.models[0], text) for text in chosen]
    alpha = torch.cat([trace[0] for trace in traces])
    entropy = torch.cat([trace[1] for trace in traces])
    return {
        "tokens": alpha.numel(),
        "mean": float(alpha.mean()),
        "std": float(alpha.std()),
        "min": float(alpha.min()),
        "max": float(alpha.max()),
        "below": float((alpha < _ALPHA_EDGE).double().mean()),
        "above": float((alpha > 1 - _ALPHA_EDGE).double().mean()),
        "histogram": torch.histc(alpha, ALPHA_BINS, 0.0, 1.0).int().tolist(),
        "correlation_with_entropy": _correlation(alpha, entropy),
        "by_position": _by_position([trace[0] for trace in traces], o["positions"]),
        "traces": [
            [round(float(a), 4) for a in trace[0][: o["positions"]]]
            for trace in traces[: o["traces"]]
        ],
    }


def _trace(model: DualHeadForCausalLM, text: Text) -> tuple[Tensor, Tensor]:
    """For a response's tokens, (n,) each: alpha, and the entropy of pi_LM in nats."""
    ids = torch.tensor([text.ids], device=model.device)
    logits = model(input_ids=ids, strength=0.0, use_cache=False).logits[0, :-1]
    model(input_ids=ids, use_cache=False)
    alpha = model.lm_head_module.last_alpha[0, :-1]
    log_probs = torch.log_softmax(logits.double(), -1)
    scored = torch.tensor(text.response[1:], dtype=torch.bool, device=ids.device)
    return alpha[scored].double().cpu(), -(log_probs.exp() * log_probs).sum(-1)[scored].cpu()


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 0 if either is constant."""
    if a.std() < 1e-9 or b.std() < 1e-9:
        return 0.0
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


def _by_position(traces: Sequence[Tensor], positions: int) -> list[list[float]]:
    """[mean, first and third quartile] over texts, at each position that at least half of the
    responses reach.
    """
    found = []
    for place in range(positions):
        there = torch.stack([trace[place] for trace in traces if len(trace) > place] or [Tensor()])
        if there.numel() * 2 < len(traces):
            break
        quartiles = torch.quantile(there, torch.tensor([0.25, 0.75], dtype=there.dtype)).tolist()
        found.append([round(float(there.mean()), 4), *(round(q, 4) for q in quartiles)])
    return found


# --- cost -----------------------------------------------------------------------------------------


def cost(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """All systems in turns, sampled, a fixed number of tokens; options: systems (name -> decoder,
    decoder_options), dtype, prompt_tokens and the arguments of ``cost.measure``; needs
    ``<name>/<role>``. Results: name -> rows by batch size, trained parameters, FLOPs.
    """
    o = cell.options
    systems, trained, flops = {}, {}, {}
    for name, spec in o["systems"].items():
        running = open_system(
            spec["decoder"],
            folders_of(cell, store, f"{name}/"),
            spec["decoder_options"],
            o["dtype"],
        )
        systems[name] = costs.System(_fixed_length(running, o["new_tokens"]), running.models)
        trained[name] = _trained(cell, store, f"{name}/")
        flops[name] = _flops(running, spec, o["prompt_tokens"] + o["new_tokens"])
        vocabulary = len(running.tokenizer)
    generator = torch.Generator().manual_seed(0)
    size = (max(o["batch_sizes"]), o["prompt_tokens"])
    found = costs.measure(
        systems,
        torch.randint(3, vocabulary, size, generator=generator).to(device()),
        o["new_tokens"],
        o["batch_sizes"],
        o["seconds"],
        o.get("min_rounds", 5),
    )
    return {
        name: {
            "rows": [each.row() for each in rows],
            "trained_parameters": trained[name],
            "flops_per_token": flops[name],
        }
        for name, rows in found.items()
    }


def _fixed_length(running: Running, new_tokens: int) -> Any:
    # Not by min_new_tokens, a logits processor that would slow every system.
    running.models[0].generation_config.eos_token_id = None

    def decode(inputs: dict[str, Tensor]) -> Tensor:
        return running.decode(
            inputs,
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=running.tokenizer.pad_token_id,
        )

    return decode


def _trained(cell: Cell, store: Store, prefix: str) -> int:
    """Number of parameters trained for a system; each trained need counts once."""
    needs = {n.name: n for role, n in cell.needs.items() if role.startswith(prefix)}
    return sum(
        store.result(need)["trained_parameters"] for need in needs.values() if need.step == "train"
    )


def _flops(running: Running, spec: dict[str, Any], context: int) -> int:
    """FLOPs of one new token at the longest context; see ``cost.flops_per_token``."""
    first, *others = running.models
    head = getattr(first, "dual_head_config", None)
    total = costs.flops_per_token(first.config, context, head)
    rows = {"args": 1 + spec["decoder_options"].get("k", 0)}.get(spec["decoder"], 1)
    for model in others:
        scores = spec["decoder"] in ("args", "best_of_n")
        own = getattr(model, "dual_head_config", None)
        total += rows * costs.flops_per_token(model.config, context, own, lm_head=not scores)
    return total * spec["decoder_options"].get("n", 1)
