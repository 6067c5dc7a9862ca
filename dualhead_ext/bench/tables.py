# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of a results file: the training loss, whole models, training, corrections.

Takes plain dicts and returns lines; nothing here needs torch.
"""

from __future__ import annotations

from typing import Any

from .comparisons import setting, shown

_SYMBOLS = {"reward": "W_RM", "lm": "W_LM", "hidden": "h"}


def loss_setting(row: dict[str, Any]) -> str:
    """The batch of a ``loss`` row: its tokens, and any deviation from the paper's setting (pairs,
    backbone and LM head frozen). Rows of older files lack these keys and have that setting."""
    words = [f"{row['tokens']} tokens"]
    words += {0: ["in the LM term alone"], 1: ["one pair"]}.get(row.get("pairs"), [])
    if (count := row.get("objectives", 1)) > 1:
        words.append(f"K = {count}")
    words += ["packed"] if row.get("packed") else []
    gradients = row.get("gradients", ["reward"])
    if gradients != ["reward"]:
        words.append(f"gradients of {' '.join(_SYMBOLS[name] for name in gradients)}")
    return ", ".join(words)


def loss_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Time and memory of each contender, and its time relative to the fused loss."""
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        setting = loss_setting(row).replace(" tokens", "", 1)
        key = (row["d"], row["V"], row["format"], setting)
        cases.setdefault(key, {})[row["contender"]] = row
    present = {row["contender"] for row in rows}
    others = {"eager": "eager", "compile": "torch.compile"}
    others |= {"torch_chunked": "torch's chunked, LM term only", "liger": "Liger, LM term only"}
    others = {name: title for name, title in others.items() if name in present}
    lines = _head("loss, d x V", "weights", "tokens", "dualhead", *others.values())
    for (d, V, name, setting), of_case in cases.items():
        ours = of_case["dualhead"]
        cells = [f"{d} x {V}", name, setting, f"{_time_and_memory(ours)}"]
        for contender in others:
            row = of_case.get(contender)
            times = row and row["us_median"] / ours["us_median"]
            cells.append(f"{_time_and_memory(row)}, {times:.2f}x" if row else "")
        lines.append(_line(*cells))
    return lines


def model_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Throughput of whole models."""
    return _head("model", "weights", "decoding with", "tokens/s") + [
        _line(row["model"], row["format"], row["contender"], f"{row['tokens_per_s_median']:.1f}")
        for row in rows
    ]


def training_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Throughput and memory of training steps."""
    lines = _head("training", "weights", "step", "tokens/s", "memory held", "and in a step")
    for row in rows:
        held, extra = (f"{row[name] / 1e6:.0f} MB" for name in ("held_bytes", "extra_bytes"))
        rate = f"{row['tokens_per_s_median']:.0f}"
        lines.append(_line(row["model"], row["format"], row["contender"], rate, held, extra))
    return lines


def correction_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Cost of each corrections contender, its comparisons, and whether its goals are reached."""
    lines = _head("measured", "contender", "takes", "over", "goal")
    for row in rows:
        values = {name: row[name] for name in _SETTING if name in row}
        rank = f" r = {row['rank']}" if "rank" in row else ""
        cells = [f"{row['measure']}, {setting(values)}", row["contender"] + rank, shown(row)]
        over, goals = [], []
        for found in row["comparisons"]:
            if found["over"] is not None:
                what = "" if found["what"] == "time" else f", {found['what']}"
                spread = f" ({found['low']:.3f}..{found['high']:.3f})"
                spread = spread if found["low"] != found["high"] else ""
                over.append(f"{found['over']}{what}: {found['value']:.3f}{spread}")
            if found["goal"] is not None:
                goals.append(f"{found['goal']:.4g}: {found['outcome']}")
        lines.append(_line(*cells, "; ".join(over), "; ".join(goals)))
    return lines


# Keys that identify the setting of a corrections row, in this order.
_SETTING = ("model", "d", "V", "format", "B", "T", "mix", "tokens", "new_tokens")


def _head(*titles: str) -> list[str]:
    return [_line(*titles), _line(*["---"] * len(titles))]


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _time_and_memory(row: dict[str, Any]) -> str:
    return f"{row['us_median'] / 1e3:.0f} ms, {row['extra_bytes'] / 1e6:.0f} MB"
