# SPDX-License-Identifier: Apache-2.0
"""What is known of each token of a text, and that as HTML: a page that needs no network, and a
fragment for notebooks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

from .alpha_scale import COLORS, AlphaScale


@dataclass(frozen=True)
class Choice:
    """A token that could have come, and how likely it was.

    Attributes:
        text: of the token alone.
        probability: in [0, 1].
    """

    text: str
    probability: float


@dataclass(frozen=True)
class InspectedToken:
    """One token of a text, and the distributions that it came from.

    Attributes:
        token: its id.
        text: what it adds to the text; "" in the middle of a character.
        alpha: the weight of the reward head where it was chosen, after every control.
        kl: ``KL(pi_mix || pi_LM)`` there, nats.
        probability: of this token in the mixture, the LM head and the reward head.
        mixture, lm_head, reward_head: the likeliest tokens of each, the likeliest first.
    """

    token: int
    text: str
    alpha: float
    kl: float
    probability: tuple[float, float, float]
    mixture: tuple[Choice, ...]
    lm_head: tuple[Choice, ...]
    reward_head: tuple[Choice, ...]


@dataclass(frozen=True)
class Inspection:
    """A text under one setting of the controls. In a notebook it shows itself.

    Attributes:
        tokens: those that the model chose or could have chosen: all after the prompt.
        label: what the setting is called, for example "strength 1.5".
        prompt: the text before the tokens.
    """

    tokens: tuple[InspectedToken, ...]
    label: str = ""
    prompt: str = ""

    @property
    def scale(self) -> AlphaScale | None:
        """The range of alpha in the text; None of an empty one."""
        return AlphaScale.of(token.alpha for token in self.tokens)

    def _repr_html_(self) -> str:
        return fragment(self, self.scale)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.1rem; line-height: 1.9;
  margin: 1rem 0; }
.text span { padding: .15rem 0; cursor: default; color: #111; }
.text span:hover, .text span:focus, .text span.shown { outline: 2px solid #111; }
.prompt { color: #666; white-space: pre-wrap; overflow-wrap: anywhere; }
.legend span { padding: .15rem .4rem; color: #111; }
.note { color: #555; }
table { border-collapse: collapse; margin-top: .5rem; }
th, td { padding: .1rem .8rem .1rem 0; text-align: left; font-weight: normal; white-space: pre; }
th { color: #555; border-bottom: 1px solid #ccc; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
input[type=range] { width: 20rem; vertical-align: middle; }
"""

_SCRIPT = """
const runs = JSON.parse(document.getElementById("data").textContent);
const details = document.getElementById("details");
const texts = [...document.querySelectorAll(".run")];
const slider = document.getElementById("strength");
let current = 0;
function cell(row, text, kind) {
  const td = row.appendChild(document.createElement(kind || "td"));
  td.textContent = text;
  if (/^[0-9.]+ %$/.test(text)) td.className = "number";
}
function percent(p) { return (100 * p).toFixed(1) + " %"; }
function show(span) {
  document.querySelectorAll(".shown").forEach(other => other.classList.remove("shown"));
  span.classList.add("shown");
  const token = runs[current].tokens[span.dataset.i];
  details.replaceChildren();
  const head = details.appendChild(document.createElement("p"));
  head.textContent = JSON.stringify(token.text) + ": alpha " + token.alpha + ", KL " + token.kl +
    " nats; probability in the mixture " + percent(token.p[0]) + ", LM head " +
    percent(token.p[1]) + ", reward head " + percent(token.p[2]);
  const table = details.appendChild(document.createElement("table"));
  const names = table.insertRow();
  for (const name of ["mixture", "", "LM head", "", "reward head", ""]) cell(names, name, "th");
  for (let i = 0; i < token.top[0].length; i++) {
    const row = table.insertRow();
    for (const head of token.top) {
      cell(row, JSON.stringify(head[i][0]));
      cell(row, percent(head[i][1]));
    }
  }
}
for (const name of ["mouseover", "focusin", "click"]) {
  document.addEventListener(name, event => {
    if (event.target.dataset && event.target.dataset.i !== undefined) show(event.target);
  });
}
function choose(run) {
  current = run;
  texts.forEach((text, i) => { text.hidden = i !== run; });
  if (slider) document.getElementById("label").textContent = runs[run].label;
  const first = texts[run].querySelector("[data-i]");
  if (first) show(first);
}
if (slider) slider.addEventListener("input", () => choose(Number(slider.value)));
choose(0);
"""


def page(runs: Sequence[Inspection], title: str) -> str:
    """A whole page. Colours of all runs are of one scale, so that they can be compared."""
    scale = AlphaScale.of(token.alpha for run in runs for token in run.tokens)
    # "<" would let a text end the script element.
    data = json.dumps([_data(run, scale) for run in runs], ensure_ascii=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    slider = ""
    if len(runs) > 1:
        slider = (
            f'<p><input id="strength" type="range" min="0" max="{len(runs) - 1}" value="0" step="1"'
            f' aria-label="setting"> <span id="label">{escape(runs[0].label)}</span></p>'
        )
    body = "".join(
        f'<div class="run"{" hidden" if number else ""}>{_text(run, scale)}</div>'
        for number, run in enumerate(runs)
    )
    label = f'<p class="note">{escape(runs[0].label)}</p>' if len(runs) == 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1>{label}{slider}{_legend(scale)}\n{body}\n"
        '<div id="details" aria-live="polite"></div>\n'
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def fragment(run: Inspection, scale: AlphaScale | None) -> str:
    """Tokens and legend without a script: what is known of a token is in its tooltip."""
    label = f"<p>{escape(run.label)}</p>" if run.label else ""
    return f"<div>{label}{_legend(scale)}{_text(run, scale)}</div>"


def _data(run: Inspection, scale: AlphaScale | None) -> dict[str, Any]:
    return {"label": run.label, "tokens": [_token_data(token, scale) for token in run.tokens]}


def _token_data(token: InspectedToken, scale: AlphaScale) -> dict[str, Any]:
    heads = (token.mixture, token.lm_head, token.reward_head)
    return {
        "text": token.text,
        "alpha": scale.number(token.alpha),
        "kl": f"{token.kl:.4f}",
        "p": [round(p, 5) for p in token.probability],
        "top": [[[c.text, round(c.probability, 5)] for c in head] for head in heads],
    }


def _legend(scale: AlphaScale | None) -> str:
    if scale is None:
        return "<p>no token</p>"
    if scale.flat:
        return f"<p>alpha: {scale.number(scale.low)} at each token</p>"
    count = len(COLORS)
    boxes = "".join(
        f'<span style="background:{color};color:#111;padding:0 .4em">'
        f"{scale.number(scale.middle(level, count))}</span>"
        for level, (_, color) in enumerate(COLORS)
    )
    return f'<p class="legend">alpha {boxes} (0: backbone, 1: reward head)</p>'


def _text(run: Inspection, scale: AlphaScale | None) -> str:
    shown = "".join(_span(number, token, scale) for number, token in enumerate(run.tokens))
    prompt = f'<span class="prompt" style="color:#666">{escape(run.prompt)}</span>'
    summary = ""
    if run.tokens:
        alphas, kls = [t.alpha for t in run.tokens], [t.kl for t in run.tokens]
        values = (scale.number(value) for value in (fmean(alphas), min(alphas), max(alphas)))
        summary = "alpha: mean {}, min {}, max {}".format(*values)
        summary = f'<p class="note">{summary}; KL {fmean(kls):.4f} nats per token</p>'
    text = f'<div class="text" style="white-space:pre-wrap">{prompt}{shown}</div>'
    return text + summary


def _span(number: int, token: InspectedToken, scale: AlphaScale) -> str:
    heads = (("LM head", token.lm_head), ("reward head", token.reward_head))
    lines = [f"alpha {scale.number(token.alpha)}, KL {token.kl:.4f} nats"]
    lines += [
        f"{name}: " + ", ".join(f"{c.text!r} {100 * c.probability:.1f} %" for c in choices[:3])
        for name, choices in heads
    ]
    title = escape("\n".join(lines), quote=True).replace("\n", "&#10;")
    color = scale.hex_color(token.alpha)
    return (
        f'<span data-i="{number}" tabindex="0" title="{title}" '
        f'style="background:{color};color:#111">{escape(token.text)}</span>'
    )
