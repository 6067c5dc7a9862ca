# SPDX-License-Identifier: Apache-2.0
"""The decode benchmark (:mod:`dualhead_ext.bench`) case by case; each result is saved at once.

``python -m tools.gpu.benchmark CASE ...``. Rows have the format of ``cases`` in results files.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from . import worker

ROUNDS, TOY_ROUNDS = 60, 3
_FEWER_SECONDS = 0.3  # seconds of timing per case, as in `dualhead bench --quick`


def plan(toy: bool) -> dict[str, tuple[Any, Any]]:
    """Label -> (group, case): one greedy request of each group, then the others, torch.compile
    last."""
    from dualhead_ext.bench import cases

    groups = cases.gpu_plan()
    if toy:
        few = (
            cases.Case(3, 5, sampled=True, graphs=True),
            cases.Case(1, 9, graphs=True, quantized=True),
        )
        groups = [cases.Group(128, 77, "bf16", few)]
    pairs = [(group, case) for group in groups for case in group.cases]

    def place(pair: tuple[Any, Any]) -> tuple[bool, bool]:
        case = pair[1]
        return case.compile, (case.B, case.T, case.sampled) != (1, 256, False)

    return {label(*pair): pair for pair in sorted(pairs, key=place)}


def label(group: Any, case: Any) -> str:
    """ "4096x32000-bf16-B1-T256-greedy"."""
    token = "sampled" if case.sampled else "greedy"
    compiled = "-compile" if case.compile else ""
    return f"{group}-B{case.B}-T{case.T}-{token}{compiled}"


@functools.lru_cache(maxsize=1)
def _operands(group: Any, cold_bytes: int, device: str) -> tuple[Any, Any]:
    from dualhead_ext.bench import contenders
    from dualhead_ext.measurement import machine

    operands = contenders.Operands(group, cold_bytes, device)
    return operands, machine.read_bandwidth(operands.memory, seconds=0.1)


def run_case(name: str, device: str, toy: bool) -> dict[str, Any]:
    """Time a case and print its rows as records."""
    from dualhead_ext.bench import cases, decode
    from dualhead_ext.measurement import machine

    group, case = plan(toy)[name]
    effort = decode.Effort(
        seconds=0.0 if toy else _FEWER_SECONDS,
        cold_bytes=2**19 if toy else machine.cold_bytes(device),
        cache_bytes=machine.last_level_cache_bytes(device),
        min_rounds=TOY_ROUNDS if toy else ROUNDS,
    )
    worker.phase("operands")
    # Groups of the same size share their weights.
    shared = cases.Group(group.d, group.V, group.format, ())
    operands, read = _operands(shared, effort.cold_bytes, device)
    worker.phase("contenders")
    result = decode.run_case(case, operands, effort, read)
    for row in result.rows(result.read):
        worker.row(**row)
    failure = result.failure(result.read)
    return {"too_slow": failure} if failure else {}


def main() -> None:
    """Run the named cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="small sizes")
    options = parser.parse_args()
    worker.load()
    worker.go_through(options.cases, lambda name: run_case(name, options.device, options.toy))


if __name__ == "__main__":
    main()
