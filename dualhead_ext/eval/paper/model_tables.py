# SPDX-License-Identifier: Apache-2.0
"""Tables of the systems' likelihoods of given texts, gate statistics and costs."""

from __future__ import annotations

from typing import Any

from .plan import MAIN
from .systems import ABLATIONS, GATED, SYSTEMS, TIMED
from .table import NOT_RUN, Results, Table, interval, number, percent, score


def likelihoods(r: Results) -> Table:
    rows = []
    for name in SYSTEMS:
        measured = r.plan.systems.get((MAIN, name, 0))
        if name == "merged" or (measured is not None and measured.likelihood is None):
            continue
        place = (MAIN, name, 0)
        head = r.of(place, "likelihood", "reward_head")
        rows.append(
            [
                r.label(name),
                interval(r.of(place, "likelihood", "perplexity"), 1),
                interval(r.of(place, "likelihood", "kl"), 3),
                percent(r.of(place, "likelihood", "pair_accuracy")),
                "-" if head is None else percent(head),
            ]
        )
    longer = r.of((MAIN, "backbone", 0), "likelihood", "longer_is_better")
    header = (
        "system",
        "perplexity of chosen",
        "KL from backbone, nats/token",
        "pair accuracy, %",
        "of the reward head alone, %",
    )
    note = (
        "On chosen and rejected responses of held-out pairs. Pair accuracy: the chosen one has the "
        f"greater log-probability. The rule that takes the longer one: {percent(longer)} %. ARGS "
        "and best of n have no distribution of the next token."
    )
    return Table("likelihoods", "What the systems think of given texts", note, header, rows)


def ablations(r: Results) -> Table:
    rows = []
    for name in ABLATIONS:
        place, gate = (MAIN, name, 0), r.plan.gates.get(name)
        gated = name in GATED
        rows.append(
            [
                r.label(name),
                score(r.of(place, "reward", "reward")),
                interval(r.of(place, "likelihood", "perplexity"), 1),
                percent(r.of(place, "likelihood", "pair_accuracy")),
                number(r.get(gate, "mean")) if gated else "-",
                number(r.get(gate, "std"), 3) if gated else "-",
                _share(r.get(gate, "below")) if gated else "-",
                _share(r.get(gate, "above")) if gated else "-",
                number(r.get(gate, "correlation_with_entropy")) if gated else "-",
            ]
        )
    header = (
        "variant",
        "average reward",
        "perplexity of chosen",
        "pair accuracy, %",
        "mean alpha",
        "sd of alpha",
        "alpha < 0.01, %",
        "alpha > 0.99, %",
        "correlation with entropy",
    )
    note = (
        "alpha over the chosen responses of held-out pairs; its correlation with the entropy of "
        "the LM head's distribution at the same token."
    )
    return Table("ablations", "The gate and what it is made of", note, header, rows)


def _share(value: float | None) -> str:
    return NOT_RUN if value is None else f"{100 * value:.1f}"


def sweep(r: Results) -> Table:
    rows = [
        [
            f"{alpha:g}",
            score(r.get(measured.reward, "reward")),
            interval(r.get(measured.likelihood, "perplexity"), 1),
            interval(r.get(measured.likelihood, "kl"), 3),
            percent(r.get(measured.likelihood, "pair_accuracy")),
            number(r.get(measured.texts, "words"), 1),
        ]
        for alpha, measured in r.plan.sweep.items()
    ]
    header = (
        "alpha",
        "average reward",
        "perplexity of chosen",
        "KL from backbone",
        "pair accuracy, %",
        "words",
    )
    note = (
        "The head trained with the fixed gate at 0.5, decoded with each alpha. At alpha = 0 it is "
        "the backbone."
    )
    return Table("sweep", "A fixed gate, swept", note, header, rows)


def costs(r: Results) -> Table:
    sizes = r.plan.scale.cost["batch_sizes"]
    rows = []
    for name in TIMED:
        found = r.get(r.plan.cost, name)
        if found is None:
            rows.append([r.label(name), *[NOT_RUN] * (2 * len(sizes) + 6)])
            continue
        each = found["rows"]
        plain = r.get(r.plan.cost, "backbone")["rows"]
        rows.append(
            [
                r.label(name),
                *(_latency(row) for row in each),
                *(f"{row['tokens_per_s_median']:.0f}" for row in each),
                f"{each[0]['ms_per_token_median'] / plain[0]['ms_per_token_median']:.2f}",
                f"{each[0]['memory_bytes'] / 1e6:.1f}",
                f"{each[0]['forwards_per_token']:.2f}",
                f"{each[0]['passes_per_position']:.2f}",
                f"{found['trained_parameters'] / 1e6:.2f} / "
                f"{each[0]['resident_parameters'] / 1e6:.2f}",
                f"{found['flops_per_token'] / 1e6:.1f}",
            ]
        )
    header = (
        "system",
        *(f"ms/token, B={size}" for size in sizes),
        *(f"tokens/s, B={size}" for size in sizes),
        "of backbone, B=1",
        "memory, MB, B=1",
        "forwards/token",
        "passes/position",
        "trained / resident, M",
        "MFLOP/token",
    )
    note = (
        "Sampled, a fixed number of tokens, prompt included, medians (quartiles), all systems in "
        "turns in one run. Memory: on a GPU the allocator's peak; on a CPU weights and caches, "
        "counted. FLOPs are counted from the configuration."
    )
    return Table("costs", "What decoding costs", note, header, rows)


def _latency(row: dict[str, Any]) -> str:
    low, high = row["ms_per_token_q1"], row["ms_per_token_q3"]
    return f"{row['ms_per_token_median']:.2f} ({low:.2f}-{high:.2f})"


def judges(r: Results) -> Table:
    rows = []
    for name, cell in r.plan.judges.items():
        found = [r.get(cell, subset) or {} for subset in ("all", "helpful-base", "harmless-base")]
        rows.append(
            [
                name,
                *(percent(each.get("accuracy")) for each in found),
                *(percent(each.get("longer_is_better")) for each in found[:1]),
            ]
        )
    header = ("reward model", "all, %", "helpful, %", "harmless, %", "longer one, all, %")
    note = (
        "How often a reward model scores the chosen response of a held-out pair higher (Wilson "
        "intervals). Those named guide steer ARGS and best of n; the one named judge scores all "
        "texts."
    )
    return Table("judges", "Reward models as judges of pairs", note, header, rows)
