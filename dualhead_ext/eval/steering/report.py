# SPDX-License-Identifier: Apache-2.0
"""The output of a run: results.json, a page with tables, and what a later run resumes from: the
cells' records and all texts.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..paper.cells import Store, unfolded
from ..paper.table import Table
from ..scorers import scorer
from ..text import words
from . import json_lines
from .attributes import ATTRIBUTES
from .intervals import mean_interval
from .plan import BACKBONE, FRONT, RANKED, Plan, System
from .steps import TEXTS as TEXTS_OF_A_CELL
from .steps import samples_file

# Parts of a cell's environment that stay in its own record and are not copied to the run's.
_OF_A_MOMENT = ("date", "load_average")
RESULTS, TEXTS, RUN, PAGE = "results.json", "texts.jsonl.gz", "run.json", "README.md"
CELLS, SAMPLES = "cells.jsonl.gz", "samples.jsonl.gz"
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
            place = _of_texts(system, attribute, target, seed)
            texts += [place | row for row in json_lines.read(store.folder(cell) / TEXTS_OF_A_CELL)]
    return results, texts


def _of_texts(system: System, attribute: str, target: float | None, seed: int) -> Row:
    """What every text of a decoded cell says of its origin."""
    return {**system.parts, "attribute": attribute, "kl_target": target, "seed": seed}


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
    json_lines.pack(texts, store.out / TEXTS)
    cells = unfolded(plan.cells())
    json_lines.pack([record for record in map(store.record, cells) if record], store.out / CELLS)
    sampled = [cell for cell in cells if cell.step == "samples" and store.done(cell)]
    json_lines.pack(
        [
            {"key": cell.key} | row
            for cell in sampled
            for row in json_lines.read(samples_file(store, cell.key))
        ],
        store.out / SAMPLES,
    )
    run = _run(plan, store) | {"gains": gains_of(texts)}
    (store.out / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (store.out / PAGE).write_text(page(results, texts, run), encoding="utf-8")
    return [store.out / name for name in (RESULTS, TEXTS, RUN, CELLS, SAMPLES, PAGE)]


def restore(plan: Plan, store: Store) -> None:
    """Add the cells and texts of the folder's packed files, so that a run can resume from a
    published report alone. Models are trained again if a remaining cell reads them.

    Raises:
        ValueError: a file is not one that :func:`write` wrote.
    """
    if not (store.out / CELLS).is_file():
        return
    _restore_samples(store)
    for record in json_lines.unpack(store.out / CELLS):
        key = str(record.get("key"))
        if record.get("step") != "samples" or samples_file(store, key).is_file():
            store.keep(record)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in json_lines.unpack(store.out / TEXTS):
        origin = {name: row.pop(name, None) for name in _of_texts(BACKBONE, "", None, 0)}
        groups[json.dumps(origin)].append(row)
    for place, cell in plan.decoded.items():
        found = groups.get(json.dumps(_of_texts(*place)))
        if found and store.done(cell) and not store.folder(cell).is_dir():
            json_lines.write(found, store.folder(cell) / TEXTS_OF_A_CELL)


def _restore_samples(store: Store) -> None:
    if not (store.out / SAMPLES).is_file():
        return
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in json_lines.unpack(store.out / SAMPLES):
        groups[str(row.pop("key", ""))].append(row)
    for key, rows in groups.items():
        if not re.fullmatch("[0-9a-f]{16}", key):  # a part of a file's name
            raise ValueError(f"suite: {SAMPLES} must name cells by 16 hex digits, got {key!r}")
        path = samples_file(store, key)
        if not path.is_file():
            json_lines.write(rows, path)


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
        "sizes": _of_sizes(plan, store),
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


def _of_sizes(plan: Plan, store: Store) -> dict[str, Row]:
    """The reward heads by size: means over the seeds, by name."""
    groups: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    for (name, _), cell in plan.sizes.items():
        decoded, trained = store.record(cell), store.record(cell.needs["model"])
        if decoded and trained and "out_of_reach" not in decoded["result"]:
            groups[name].append((decoded["result"], trained["result"]))
    return {name: _mean_size(found) for name, found in groups.items()}


def _mean_size(found: Sequence[tuple[Row, Row]]) -> Row:
    decoded, trained = zip(*found, strict=True)
    gold, *heldout = ATTRIBUTES[RANKED].scorers
    return {
        "parameters": trained[0]["parameters"],
        "train_seconds": fmean(row["train_seconds"] for row in trained),
        "held_out_accuracy": fmean(row["held_out_accuracy"] for row in trained),
        "gold": [fmean(row["scores"][gold][i] for row in decoded) for i in range(3)],
        "heldout": [fmean(row["scores"][heldout[0]][i] for row in decoded) for i in range(3)],
        "kl": fmean(row["kl"] for row in decoded),
        "perplexity": fmean(row["perplexity"] for row in decoded),
        "seeds": len(found),
    }


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
    if run["sizes"]:
        lines.append(sizes(run).markdown())
    if run["costs"]:
        lines.append(_costs(run).markdown())
    lines += [
        "`results.json`: one object for each system, attribute, target and seed. "
        "`texts.jsonl.gz`: every decoded text. `run.json`: machine, strengths, trainings. "
        "`cells.jsonl.gz` and `samples.jsonl.gz`: what a run with `--out` on a copy of this folder "
        "resumes from.",
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


def sizes(run: Row) -> Table:
    """Reward heads by size, the values of each as means over the seeds."""
    found = ATTRIBUTES[RANKED]
    header = (
        "reward head, fixed gate", "trained parameters", "training, s", "held-out pairs right",
        f"gold ({found.gold}) [95 %]", f"held out ({found.heldout[0]}) [95 %]", "KL", "perplexity",
        "seeds",
    )  # fmt: skip
    rows = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['train_seconds']:.1f}",
            f"{100 * row['held_out_accuracy']:.1f} %",
            *("{:.3f} [{:.3f}, {:.3f}]".format(*row[score]) for score in ("gold", "heldout")),
            f"{row['kl']:.3f}",
            f"{row['perplexity']:.1f}",
            str(row["seeds"]),
        ]
        for name, row in run["sizes"].items()
    ]
    note = f"Heads of all sizes, trained alike for {RANKED}; means over seeds."
    return Table("sizes", "Reward heads by size", note, header, rows)


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
