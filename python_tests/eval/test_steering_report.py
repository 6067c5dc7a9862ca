# SPDX-License-Identifier: Apache-2.0
"""The steering suite's packed report: what a run must not resume from."""

import pytest

from dualhead_ext.eval.paper.cells import Store
from dualhead_ext.eval.steering import json_lines, report, steps
from dualhead_ext.eval.steering.plan import SIZES, Planner


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (report.CELLS, [{"step": "decode", "key": "../../x"}], "must name its step and key"),
        (report.SAMPLES, [{"key": "../x", "prompt": ""}], "must name cells by 16 hex digits"),
        (report.TEXTS, None, "must be gzip with one JSON object per line"),
    ],
)
def test_a_broken_report_is_not_resumed_from(tmp_path, name, rows, message):
    plan = Planner(SIZES["tiny"], ["sentiment"], 1, [0.1])()
    for each in (report.CELLS, report.SAMPLES, report.TEXTS):
        json_lines.pack([], tmp_path / each)
    if rows is None:
        (tmp_path / name).write_bytes(b"text")
    else:
        json_lines.pack(rows, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        report.restore(plan, Store(tmp_path, steps.STEPS))
