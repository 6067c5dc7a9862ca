# SPDX-License-Identifier: Apache-2.0
"""The output of a run: results.json, all texts in texts.jsonl.gz, and a page with tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..paper.cells import Store, unfolded
from ..paper.table import Table
from ..scorers import scorer
from ..text import words
from .attributes import ATTRIBUTES
from .intervals import mean_interval
from .plan import FRONT, Plan
from .steps import pack, read_texts

# Parts of a cell's environment that stay in its own record and are not copied to the run's.
_OF_A_MOMENT = ("date", "load_average")
RESULTS, TEXTS, RUN, PAGE = "results.json", "texts.jsonl.gz", "run.json", "README.md"
Row = dict[str, Any]


def rows_of(plan: Plan, store: Store) -> tuple[list[Row], list[Row]]:
    """(results, texts) of every decoded cell that was computed."""
    results, texts = [], []
    for (system, attribute, target, seed), cell in plan.decoded.items():
        record = store.record(cell)
        if record is None or "out_of_reach" in record["result"]:
            continue
        found, parts = record["result"], system.parts
        trained = store.record(cell.needs["model"]) if "model" in cell.needs else None
        timed = plan.costs.get(tuple(parts.values()))
        timed = None if timed is None else store.record(timed)
        value, *interval = found["scores"][ATTRIBUTES[attribute].gold]
        heldout = found["scores"][ATTRIBUTES[attribute].heldout[0]][0]
        results.append(
            {
                **parts,
                "attribute": attribute,
                "kl_target": target,
                "kl": _rounded(found["kl"]),
                "gold": _rounded(value),
                "gold_ci95": [_rounded(x) for x in interval],
                "heldout": _rounded(heldout),
                "perplexity": _rounded(found["perplexity"]),
                "words": _rounded(found["words"]),
                "tokens_per_second": timed and _rounded(timed["result"]["tokens_per_second"]),
                "train_seconds": trained and trained["result"]["train_seconds"],
                "parameters": trained["result"]["parameters"] if trained else 0,
                "prompts": cell.options["prompts"],
                "seed": seed,
            }
        )
        if store.folder(cell).is_dir():
            place = {**parts, "attribute": attribute, "kl_target": target, "seed": seed}
            texts += [place | row for row in read_texts(store.folder(cell))]
    return results, texts


def gains_of(texts: Sequence[Row]) -> list[Row]:
    """For each system, target and seed, the gain over the backbone's texts for the same prompts and
    seed, by the attribute's scorers, as [mean, low, high]; above 0 is better.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in texts:
        groups[(*_place(row), row["attribute"], row["seed"])].append(row)
    scored = {place: _rewards(rows) for place, rows in groups.items()}
    found = []
    for place, scores in scored.items():
        base = scored.get(("backbone", None, None, None, *place[-2:]))
        if place[0] == "backbone" or base is None:
            continue
        names = ("system", "reward_head", "gate", "kl_target", "attribute", "seed")
        gains = {
            name: mean_interval([a - b for a, b in zip(own, base[name], strict=True)])
            for name, own in scores.items()
        }
        found.append(dict(zip(names, place, strict=True)) | {"gains": gains})
    return found


def _rewards(rows: Sequence[Row]) -> dict[str, list[float]]:
    names = ATTRIBUTES[rows[0]["attribute"]].scorers
    pairs = [(row["prompt"], row["text"]) for row in rows]
    return {n: [scorer(n).rewards(prompt, [text])[0] for prompt, text in pairs] for n in names}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def write(plan: Plan, store: Store) -> list[Path]:
    """Write all files into the run's folder; returns their paths."""
    results, texts = rows_of(plan, store)
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in results)
    (store.out / RESULTS).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    pack(texts, store.out / TEXTS)
    run = _run(plan, store) | {"gains": gains_of(texts)}
    (store.out / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (store.out / PAGE).write_text(page(results, texts, run), encoding="utf-8")
    return [store.out / name for name in (RESULTS, TEXTS, RUN, PAGE)]


def _run(plan: Plan, store: Store) -> Row:
    """The rest of the output: machine, extent of the run, times, two-objective front."""
    records = [r for r in map(store.record, unfolded(plan.cells())) if r is not None]
    machines = [
        {name: value for name, value in r["environment"].items() if name not in _OF_A_MOMENT}
        for r in records
    ]
    environments = {json.dumps(machine, sort_keys=True) for machine in machines}
    of_weights: dict[float, list[Row]] = defaultdict(list)
    for (weight, _), cell in plan.front.items():
        if (record := store.record(cell)) is not None:
            of_weights[weight].append(record["result"])
    front = {f"{weight:g}": _mean_front(of_weights[weight]) for weight in sorted(of_weights)}
    costs = {}
    for parts, cell in plan.costs.items():
        if (record := store.record(cell)) is not None:
            costs[" ".join(filter(None, parts))] = record["result"]
    trained = {}
    for cell in unfolded(plan.cells()):
        if cell.step == "train" and (record := store.record(cell)) is not None:
            trained[cell.label] = record["result"]
    timed = store.record(plan.training) if plan.training else None
    decoded, missing = {}, []
    for cell in plan.decoded.values():
        if (record := store.record(cell)) is None:
            missing.append(cell.label)
        else:
            decoded[cell.label] = record["result"]
    return {
        "environments": [json.loads(text) for text in sorted(environments)],
        "cells": len(records),
        "cells_of_the_whole_grid": len(unfolded(plan.cells())),
        "seconds": round(sum(r["seconds"] for r in records)),
        "front": front,
        "costs": costs,
        "trained": trained,
        "training_time": timed and timed["result"],
        "decoded": decoded,
        "missing": missing,
    }


def _mean_front(decoded: Sequence[Row]) -> Row:
    """The means over the seeds of one weight: {attribute: [mean, low, high]}, KL, seeds."""
    golds = {
        name: [
            fmean(value)
            for value in zip(*(r["scores"][ATTRIBUTES[name].gold] for r in decoded), strict=True)
        ]
        for name in FRONT
    }
    return golds | {"kl": fmean(r["kl"] for r in decoded), "seeds": len(decoded)}


# --- tables ---------------------------------------------------------------------------------------


def distinct(texts: Iterable[str], n: int) -> float:
    """The share of distinct word n-grams among all n-grams of the texts."""
    grams = [
        tuple(found[i : i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def summary(results: Sequence[Row], texts: Sequence[Row], attribute: str) -> Table:
    """A table with a row for each system and target; values are means over the seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    written: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for row in results:
        if row["attribute"] == attribute:
            groups[_place(row)].append(row)
    for row in texts:
        if row["attribute"] == attribute:
            written[_place(row)].append(row["text"])
    base = groups.get(("backbone", None, None, None))
    lines = []
    for place, rows in groups.items():
        gold, heldout = (fmean(row[name] for row in rows) for name in ("gold", "heldout"))
        low, high = (fmean(row["gold_ci95"][i] for row in rows) for i in (0, 1))
        plain = fmean(row["gold"] for row in base) if base else None
        gain = "-" if plain is None or place[0] == "backbone" else f"{gold - plain:+.3f}"
        target = "-" if place[3] is None else f"{place[3]:g}"
        lines.append(
            [
                " ".join(filter(None, place[:3])),
                target,
                f"{fmean(row['kl'] for row in rows):.3f}",
                f"{gold:.3f} [{low:.3f}, {high:.3f}]",
                gain,
                f"{min(row['gold'] for row in rows):.3f} to {max(row['gold'] for row in rows):.3f}",
                f"{heldout:.3f}",
                f"{fmean(row['perplexity'] for row in rows):.1f}",
                f"{fmean(row['words'] for row in rows):.1f}",
                f"{distinct(written[place], 2):.2f}",
                _mean(rows, "train_seconds", "{:.1f}"),
                f"{rows[0]['parameters']:,}",
                str(len(rows)),
            ]
        )
    found = ATTRIBUTES[attribute]
    header = (
        "system", "KL asked", "KL", f"gold ({found.gold}) [95 %]", "gain", "seeds' range",
        f"held out ({found.heldout[0]})", "perplexity", "words", "distinct-2", "training, s",
        "trained parameters", "seeds",
    )  # fmt: skip
    direction = "more" if found.higher_is_better else "less"
    note = (
        f"Means over seeds; {direction} of the gold score is better. The interval is the mean of "
        "the seeds' own 95 % bootstrap intervals over prompts. KL in nats per token of the decoded "
        "text; of best-of-n the bound log n - (n - 1)/n over the text. Perplexity is the plain "
        "backbone's."
    )
    return Table(attribute, attribute.capitalize(), note, header, lines)


def _place(row: Row) -> tuple[Any, ...]:
    return row["system"], row["reward_head"], row["gate"], row["kl_target"]


def _mean(rows: Sequence[Row], name: str, form: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return form.format(fmean(values)) if values else "-"


def page(results: Sequence[Row], texts: Sequence[Row], run: Row) -> str:
    """The page next to the results, as Markdown."""
    there = [name for name in ATTRIBUTES if any(r["attribute"] == name for r in results)]
    lines = [
        "# The steering suite",
        "",
        f"{run['cells']} of {run['cells_of_the_whole_grid']} cells, {run['seconds'] / 60:.0f} "
        "minutes of computing. Made by `dualhead eval --suite steering`; "
        "[docs/results.md](../../../docs/results.md) says what it shows.",
        "",
    ]
    for found in run["environments"]:
        versions = ", ".join(f"{k} {v}" for k, v in found.items() if isinstance(v, (str, int)))
        lines += [f"Machine: {versions}.", ""]
    lines += [summary(results, texts, name).markdown() for name in there]
    if beyond := {n: r["out_of_reach"] for n, r in run["decoded"].items() if "out_of_reach" in r}:
        lines += ["## Targets that a system cannot reach", ""]
        lines += [f"- {_out_of_reach(label, tried)}" for label, tried in beyond.items()]
        lines.append("")
    if run["front"]:
        lines.append(_front(run).markdown())
    if run["costs"]:
        lines.append(_costs(run).markdown())
    lines += [
        "`results.json`: one object for each system, attribute, target and seed. "
        "`texts.jsonl.gz`: every decoded text. `run.json`: machine, strengths, trainings.",
        "",
    ]
    return "\n".join(lines)


def _out_of_reach(label: str, tried: Sequence[Sequence[float]]) -> str:
    strength, kl = max(tried, key=lambda pair: pair[1])
    most = f"at most {kl:.3g} nats per token of {len(tried)} tries"
    return f"{label}: {most}, at strength {strength:.3g}"


def _front(run: Row) -> Table:
    golds = (f"{n} ({ATTRIBUTES[n].gold}) [95 %]" for n in FRONT)
    header = ("weight of sentiment", *golds, "KL", "seeds")
    rows = [
        [
            weight,
            *("{:.3f} [{:.3f}, {:.3f}]".format(*found[name]) for name in FRONT),
            f"{found['kl']:.3f}",
            str(found["seeds"]),
        ]
        for weight, found in run["front"].items()
    ]
    note = "One head with two objectives, weighted for each request; means over seeds."
    return Table("front", "Two objectives", note, header, rows)


def _costs(run: Row) -> Table:
    header = ("system", "tokens per second", "plain backbone, in turns", "time, plain = 1")
    rows = [
        [
            name,
            f"{found['tokens_per_second']:.1f}",
            f"{found['plain_tokens_per_second']:.1f}",
            f"{found['times_plain']:.2f}x",
        ]
        for name, found in run["costs"].items()
    ]
    note = "8 requests at once, greedy, `generate()`; medians of 5 turns."
    return Table("costs", "Time", note, header, rows)
