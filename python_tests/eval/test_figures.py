# SPDX-License-Identifier: Apache-2.0
"""Plots: their titles are right, and no text overlaps another or leaves the picture."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the extra plot is not installed")

from legible import check_legible
from matplotlib.colors import to_rgb

from dualhead_ext.eval.paper import plots
from dualhead_ext.eval.paper.plan import MAIN
from dualhead_ext.eval.paper.systems import ABLATIONS, GATED, SYSTEMS, TIMED
from dualhead_ext.measurement import figure as style

PLAIN = [0.01, -0.02, 0.04]


class MadeUp:
    """Replaces `Results`: every system has figures, about as close together as real ones."""

    def __init__(self, **rewards):
        names = dict.fromkeys([*TIMED, *ABLATIONS])
        self.rewards = {name: [0.012 + 1e-4 * i, -0.02, 0.04] for i, name in enumerate(names)}
        self.rewards |= {"backbone": PLAIN} | rewards
        front = {
            (name, weight): ((name, 0, weight), (name, 1, weight))
            for name in ("dual_head", "genarm_lora")
            for weight in (0.0, 0.25, 0.5, 0.75, 1.0)
        }
        gates = {name: name for name in GATED}
        self.plan = SimpleNamespace(cost="cost", gates=gates, front=front)

    def of(self, place, cell, name):
        backbone, system, seed = place
        assert (backbone, seed) == (MAIN, 0)
        return self.rewards[system]

    def get(self, cell, name):
        if cell == "cost":
            time = 2.6 + 0.01 * TIMED.index(name) + 7 * (name == "best_of_n")
            row = {"median": time, "q1": time - 0.1, "q3": time + 0.1}
            return {"rows": [{f"ms_per_token_{key}": value for key, value in row.items()}]}
        if name == "reward":
            system, objective, weight = cell
            value = (1 - 2 * objective) * 0.1 * weight + (system == "genarm_lora") * 0.02
            return [value, value - 0.2, value + 0.2]
        place = GATED.index(cell)
        return {
            "by_position": [[0.3, 0.2, 0.4]] * 40 + [[0.4, 0.3, 0.5]],
            "traces": [[0.2] * 60],
            "histogram": [20 - place, place, *[0] * 18],
        }[name]

    def label(self, name):
        return SYSTEMS[name].label


@pytest.mark.parametrize("name", plots.PLOTS)
def test_each_picture_is_legible(name):
    figure = plots.PLOTS[name](MadeUp())
    check_legible(figure)
    assert len(figure.get_suptitle()) > 20


def test_a_title_that_is_too_long_is_seen():
    figure = style.blank(5, 3)
    style.bare(figure.add_subplot())
    style.headline(figure, "x")
    check_legible(figure)
    figure.suptitle("far too long for a picture of this width " * 3)
    with pytest.raises(AssertionError):
        check_legible(figure)


def test_titles_say_what_the_numbers_say():
    def title(name, **rewards):
        return " ".join(plots.PLOTS[name](MadeUp(**rewards)).get_suptitle().split())

    nothing = title("frontier")
    assert nothing.startswith("No system's average reward is apart from the backbone's (95 %).")
    assert "Dual-Head (logits mix) 1.0" in nothing and nothing.endswith("3.7")
    better = title("frontier", dual_head=[0.2, 0.1, 0.3], genarm_lora=[-1, -2, -0.5])
    assert better.startswith(
        "Average reward is apart from the backbone's: above with Dual-Head (logits mix); below "
        "with GenARM (LoRA)."
    )
    same = title("ablations_reward", **dict.fromkeys(ABLATIONS, PLAIN))
    assert same == "Every system has the backbone's average reward, 0.01"
    assert "from 0.30 to 0.40 with linear gate" in title("alpha_over_response")
    assert "below 0.1 with 11 of 11 gates" in title("alpha_histogram")
    two = title("two_objectives")
    assert "+0.10 and -0.10 with Dual-Head (logits mix)" in two
    assert two.endswith("all within the 95 % intervals")


def test_colours_differ_for_everybody():
    """Colours differ in lightness too, for grey print and for every kind of colour blindness.

    Where two are close, the markers differ.
    """
    assert len(set(style.PALETTE)) == len(style.PALETTE) == len(set(style.MARKERS))
    weights = (0.3, 0.59, 0.11)
    light = sorted(
        sum(w * c for w, c in zip(weights, to_rgb(color), strict=True)) for color in style.PALETTE
    )
    assert min(b - a for a, b in itertools.pairwise(light)) > 0.02


def test_the_same_figures_make_the_same_file():
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        style.save(plots.frontier(MadeUp()), file, format="png")
    assert files[0].getvalue() == files[1].getvalue()
    assert b"Software" not in files[0].getvalue()
