# SPDX-License-Identifier: Apache-2.0
"""An evaluation (a plain dict) as JSON and as a Markdown page. Needs the standard library only."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from ..scorers import SCORERS

RESULTS, PAGE, PLOT = "eval.json", "eval.md", "sweep.png"
# Number of prompts whose replies the page shows; the JSON has all.
_SHOWN = 8


def to_json(report: dict[str, Any]) -> bytes:
    """The whole evaluation as JSON."""
    return (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def finding(report: dict[str, Any]) -> str:
    """The effect of the highest strength in one sentence: distance from the backbone, change of the
    first scorer (or of the length), and perplexity.
    """
    first, last = report["sweep"][0], report["sweep"][-1]
    if last["scores"]:
        name = next(iter(last["scores"]))
        change = _from_to(name, first["scores"][name], last["scores"][name])
        _, low, high = last["gains"][name]
        if low <= 0 <= high:
            change += " (the interval of the change holds 0)"
    else:
        change = _from_to("words", first["words"], last["words"])
    perplexity = _from_to("perplexity", first["perplexity"], last["perplexity"])
    return (
        f"Strength {last['strength']:g} is {_short(last['kl'][0])} nats per token from the "
        f"backbone: {change}, {perplexity}"
    )


def _from_to(name: str, a: Sequence[float], b: Sequence[float]) -> str:
    return f"{name} {_short(a[0])} to {_short(b[0])}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def with_interval(figure: Sequence[float], form: str = ".3g") -> str:
    """``0.31 [0.25, 0.38]`` of [value, low, high]."""
    value, low, high = (format(x, form) for x in figure)
    return f"{value} [{low}, {high}]"


def to_markdown(report: dict[str, Any]) -> str:
    """The page: a finding, the pairs, the sweep, replies, and how all that was measured."""
    head = report["head"]
    lines = [
        f"# Evaluation of {_code(report['heads'])}",
        "",
        f"Backbone {_code(report['backbone'])}; {head['reward_head']} reward head, {head['gate']} "
        f"gate. Brackets are 95 % intervals.",
        "",
    ]
    if report["pairs"]:
        lines += _pairs(report)
    if report["sweep"]:
        lines += _sweep(report)
        lines += _replies(report)
    return "\n".join([*lines, *_made(report)])


def _pairs(report: dict[str, Any]) -> list[str]:
    found = report["pairs"]
    rows = [
        [name, f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"]
        for name, (value, low, high) in found["accuracy"].items()
    ]
    return [
        "## Pairs",
        "",
        f"How often each prefers the better response: {found['pairs']} pairs in {found['rows']} "
        f"rows of {_code(report['data'])}.",
        "",
        *_table(("ranked by", "accuracy", "95 % interval"), rows),
        "",
        f"Reward head: {found['reward']}, as it was trained. Mixture (strength 1) and backbone: "
        "log-probability of the response. The longer one: characters. A tie is half a success. "
        f"Interval: {found['interval']}.",
        "",
    ]


def _sweep(report: dict[str, Any]) -> list[str]:
    header = ["strength", "KL, nats per token", "perplexity", "mean alpha (min to max)", "words"]
    header += [scorer_title(name) for name in report["scorers"]]
    rows = []
    for found in report["sweep"]:
        alpha = found["alpha"]
        row = [
            _strength(found["strength"]),
            with_interval(found["kl"]),
            with_interval(found["perplexity"]),
            f"{alpha['mean']:.3f} ({alpha['min']:.3f} to {alpha['max']:.3f})",
            with_interval(found["words"]),
        ]
        rows.append(row + [_score(found, name) for name in report["scorers"]])
    settings = report["settings"]
    note = (
        f"{report['prompts']} prompts from {_code(report['prompts_from'])}, one sampled reply to "
        f"each (temperature 1, at most {settings['max_new_tokens']} tokens). KL from the backbone "
        "and perplexity under it, over the tokens of the replies; intervals by a bootstrap over "
        "prompts."
    )
    if report["scorers"]:
        note += " After each score: the mean change from strength 0 over the same prompts."
    lines = ["## Strengths", "", f"{finding(report)}.", "", note, "", *_table(header, rows), ""]
    return [*lines, f"![The sweep over strengths]({PLOT})", ""] if report["plot"] else lines


def scorer_title(name: str) -> str:
    """A scorer's name with its unit and whether more or less is better."""
    if name not in SCORERS:
        return f"{name} (more is better)"
    entry = SCORERS[name]
    return f"{name} ({entry.unit}; {'more' if entry.higher_is_better else 'less'} is better)"


def _score(found: dict[str, Any], name: str) -> str:
    text = with_interval(found["scores"][name])
    if found["strength"] == 0:
        return text
    value, low, high = found["gains"][name]
    return f"{text}; {value:+.3g} [{low:+.3g}, {high:+.3g}]"


def _strength(value: float) -> str:
    return "0 (backbone)" if value == 0 else f"{value:g}"


def _replies(report: dict[str, Any]) -> list[str]:
    shown = report["replies"][:_SHOWN]
    header = ["prompt", *(f"strength {_strength(s['strength'])}" for s in report["sweep"])]
    rows = [[_cell(row["prompt"]), *map(_cell, row["replies"])] for row in shown]
    total = len(report["replies"])
    note = f"All {total} prompts."
    if len(shown) < total:
        note = f"The first {len(shown)} of {total} prompts; `{RESULTS}` has all."
    return ["## Replies side by side", "", note, "", *_table(header, rows), ""]


_NO_MARKUP = {ord(sign): f"&#{ord(sign)};" for sign in "\\`*_[]|#~"}


def _cell(text: str) -> str:
    """Generated text for a table cell: markup escaped, line breaks kept."""
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    safe = html.escape("\n".join(lines), quote=False)
    return safe.translate(_NO_MARKUP).replace("\n", "<br>") or "(empty)"


def _made(report: dict[str, Any]) -> list[str]:
    machine = report["environment"]
    names = ("device", "commit", "torch", "transformers", "python", "date")
    facts = ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name))
    return [f"Made by `dualhead eval`, seed {report['settings']['seed']}: {facts}.", ""]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _code(text: str) -> str:
    return f"`{text}`"
