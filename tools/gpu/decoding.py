# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.gpu.decoding CASE ...``: tokens per second of a model of 7B size, plain and
gated, in less time than `dualhead bench --part models` takes."""

from __future__ import annotations

import argparse
from typing import Any

from . import worker

CASES = {"eager": ("backbone", "dualhead"), "static": ("backbone_static", "dualhead_static")}
NEW_TOKENS, ROUNDS = 32, 6


def run_case(name: str, toy: bool, device: str) -> dict[str, Any]:
    """Time a plain and a gated contender; rows have the format of ``generate`` in results files."""
    from dualhead_ext.bench import generation, models

    model = generation.tiny_model(CASES[name])
    if not toy:
        build = models.LLAMA_7B.build
        model = generation.Model("random Llama, 6.7B", build, NEW_TOKENS, CASES[name])
    rounds = 2 if toy else ROUNDS
    result = generation.run_model(model, seconds=0.0, min_rounds=rounds, device_type=device)
    for row in result.rows():
        worker.row(**row)
    against = result.against_plain(CASES[name][1])
    return {"times_plain": against.value, "low": against.low, "high": against.high}


def main() -> None:
    """Run the named cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="a small model")
    options = parser.parse_args()
    worker.load()
    worker.go_through(options.cases, lambda name: run_case(name, options.toy, options.device))


if __name__ == "__main__":
    main()
