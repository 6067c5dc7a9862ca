# SPDX-License-Identifier: Apache-2.0
"""Time of the decode step, compared with a copy of as many bytes, PyTorch's GEMMs, and the step
with parts left out (ablations), which show where the time goes.

``python -m tools.gpu.timings CASE ...``. Every contender but ``two_gemms_eager`` runs from CUDA
graphs, several replays between two events; weights and caches rotate over copies larger than L2.

Ablations: ``gate_given``: the gate's logit is an argument, so the gate is not computed.
``alpha_0``: alpha is given as 0, so the reward head is not read. ``gate_given_alpha_0``: both, so
that only the LM head is read. ``sampled``, ``filters``: the token is sampled, with temperature only
or also with top-p. ``no_logits``: logits are not written.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import worker
from .records import FAILED

T = 256  # columns of the gate's cache
ABLATIONS = ("gate_given", "alpha_0", "gate_given_alpha_0", "sampled", "filters", "no_logits")
_GATE = ("q_weight", "k_weight", "u_weight", "gate_bias")
_GATE += ("cache_k", "cache_u", "cache_valid", "cache_length")


@dataclass(frozen=True)
class Case:
    """A size, a format of the heads ("bf16": not quantised), a batch, the ablations, and the reward
    head: its kind, and the rank of a correction."""

    d: int
    V: int
    format: str = "bf16"
    B: int = 1
    ablations: tuple[str, ...] = ()
    reward_head: str = "full"
    r: int = 0


CASES = {
    "bf16-4096x32000-1": Case(4096, 32000, ablations=ABLATIONS),
    "int8-4096x32000-1": Case(4096, 32000, "int8", ablations=ABLATIONS[:3]),
    "int4-4096x32000-1": Case(4096, 32000, "int4", ablations=ABLATIONS[:3]),
    "bf16-4096x128256-1": Case(4096, 128256, ablations=("gate_given", "sampled")),
    "bf16-4096x32000-64": Case(4096, 32000, B=64, ablations=("gate_given",)),
    "bf16-4096x32000-8": Case(4096, 32000, B=8, ablations=("gate_given",)),
    "bf16-4096x32000-4": Case(4096, 32000, B=4),
    "bf16-4096x32000-16": Case(4096, 32000, B=16),
    "bf16-8192x128256-1": Case(8192, 128256),
    "int8-4096x128256-1": Case(4096, 128256, "int8"),
    "int4-4096x128256-1": Case(4096, 128256, "int4"),
    "fp8-4096x32000-1": Case(4096, 32000, "fp8"),
    "embedding-4096x32000-1": Case(
        4096, 32000, ablations=("gate_given",), reward_head="embedding", r=16
    ),
    "embedding-4096x32000-8": Case(4096, 32000, B=8, reward_head="embedding", r=16),
    "embedding-int8-4096x32000-1": Case(4096, 32000, "int8", reward_head="embedding", r=16),
    "lowrank-4096x32000-1": Case(4096, 32000, reward_head="lowrank", r=64),
}
FIVE = tuple(CASES)[:5]  # the cases that have goals

Call = Callable[[int], Any]


def run_case(name: str, device: str, toy: bool) -> dict[str, Any]:
    """Time a case and print each row as a record."""
    import torch

    case = CASES[name]
    if toy:
        case = replace(case, d=128, V=200, B=min(case.B, 2))
    with torch.no_grad():
        return _Timed(case, device, toy).run()


@functools.lru_cache(maxsize=1)
def _operands(d: int, V: int, cold_bytes: int, device: str) -> Any:
    from dualhead_ext.bench import cases, contenders

    return contenders.Operands(cases.Group(d, V, "bf16", ()), cold_bytes, device)


class _Timed:
    """One case with its operands."""

    def __init__(self, case: Case, device: str, toy: bool) -> None:
        from dualhead_ext.bench import cases, contenders, decode
        from dualhead_ext.measurement import machine

        worker.phase("operands")
        self.case, self.device, self.toy = case, device, toy
        cold_bytes = 2**16 if toy else machine.cold_bytes(device)
        operands = _operands(case.d, case.V, cold_bytes, device)
        self.stacked = operands.memory
        bench_case = cases.Case(case.B, T)
        copies = operands.copies
        if case.format != "bf16":
            copies = operands.quantized(case.format, cold_bytes)
        if case.reward_head != "full":
            copies = [self._corrected(weights) for weights in copies]
        self.num_bytes = contenders.bytes_of(copies[0])
        self.num_bytes += contenders.cache_bytes(operands.group, bench_case)
        self.calls = 2 if toy else decode.calls_per_round(self.num_bytes)
        own = contenders.requests(
            operands.group, bench_case, len(copies), operands.device, steps=self.calls
        )
        self.arguments = [weights | mine for weights, mine in zip(copies, own, strict=True)]

    def _corrected(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights with a correction instead of the full reward head."""
        import torch

        d, V, r = self.case.d, self.case.V, self.case.r
        n = d if self.case.reward_head == "embedding" else V
        like = {"dtype": torch.bfloat16, "device": self.device}
        shapes = {"reward_down": (1, r, d), "reward_up": (1, n, r), "reward_bias": (1, n)}
        maps = {name: 0.01 * torch.randn(shape, **like) for name, shape in shapes.items()}
        kept = {name: w for name, w in weights.items() if not name.startswith("reward")}
        return kept | maps

    def run(self) -> dict[str, Any]:
        """Time the step and its competitors first, then the ablations."""
        worker.phase("contenders")
        plain = {"step": self._step({}), "copy": self._copy()}
        if self.case.format == "bf16":
            plain |= self._gemms() if self.case.reward_head == "full" else self._lm_head()
        bad = self._time(plain)
        if self.case.ablations:
            worker.phase("ablations")
            without = {name: self._step(self._changes(name)) for name in self.case.ablations}
            bad |= self._time({"step_again": plain["step"], **without})
        if bad:
            return {"outcome": FAILED, "detail": f"a status is not 0: {', '.join(sorted(bad))}"}
        return {"bytes": self.num_bytes, "calls": self.calls}

    def _rewind(self, copy: int) -> None:
        self.arguments[copy]["cache_length"].fill_(T - 1)

    def _graph(self, call: Call) -> Call:
        from dualhead_ext.bench.graphs import capture

        where = self.arguments[0]["hidden"].device
        return capture(call, self._rewind, len(self.arguments), where)

    def _step(self, changes: dict[str, Any]) -> Call:
        """The operator with some arguments replaced, or left out if None."""
        from dualhead_ext import ops

        kind = {"reward_head": self.case.reward_head}
        made = [arguments | kind | changes for arguments in self.arguments]
        made = [{k: v for k, v in each.items() if v is not None} for each in made]
        return self._graph(lambda copy: ops.decode_step(**made[copy]))

    def _changes(self, name: str) -> dict[str, Any]:
        import torch

        B, device = self.case.B, self.device
        changes: dict[str, Any] = {}
        if name.startswith("gate_given"):
            changes |= dict.fromkeys(_GATE) | {"gate_logit": torch.zeros(B, device=device)}
        if name.endswith("alpha_0"):
            changes["alpha"] = torch.zeros(B, device=device)
        if name in ("sampled", "filters"):
            changes |= {
                "seeds": torch.arange(B, device=device),
                "draws": torch.zeros(B, dtype=torch.int64, device=device),
                "temperature": torch.full((B,), 0.8, device=device),
            }
        if name == "filters":
            changes["top_p"] = torch.full((B,), 0.95, device=device)
        return changes | ({"return_logits": False} if name == "no_logits" else {})

    def _copy(self) -> Call:
        """A copy that reads and writes ``num_bytes`` in total."""
        import torch

        source = torch.rand(max(self.num_bytes // 8, 1), device=self.device)
        target = torch.empty_like(source)
        return lambda copy: target.copy_(source)

    def _gemms(self) -> dict[str, Call]:
        from dualhead_ext.bench.graphs import gemm_step

        arguments, stacked = self.arguments, self.stacked
        return {
            "one_gemm": self._graph(lambda copy: gemm_step(arguments[copy], stacked[copy])),
            "two_gemms_eager": lambda copy: gemm_step(arguments[copy]),
        } | self._lm_head()

    def _lm_head(self) -> dict[str, Call]:
        from dualhead_ext.bench.contenders import lm_head_step

        return {"lm_head": self._graph(lambda copy: lm_head_step(self.arguments[copy]))}

    def _time(self, calls: dict[str, Call]) -> set[str]:
        """Print a row per contender; returns those whose last call has a status other than 0."""
        from dualhead_ext.measurement.timing import Contender, alternate, clock_of

        contenders = [Contender(name, call, self._rewind) for name, call in calls.items()]
        timings = alternate(
            contenders,
            seconds=0.0 if self.toy else 0.25,
            min_rounds=3 if self.toy else 30,
            copies=len(self.arguments),
            calls=self.calls,
            clock=clock_of(self.device),
        )
        for name, timing in timings.items():
            figures = {q: round(getattr(timing, q), 3) for q in ("us_median", "us_q1", "us_q3")}
            share = {}
            if name in ("step", "step_again", "copy", "one_gemm"):
                share = {"gb_per_s": round(self.num_bytes / timing.us_median / 1e3, 1)}
            worker.row(contender=name, **figures, **share, rounds=timing.repeats, calls=self.calls)
        return {name for name, call in calls.items() if self._status(call)}

    def _status(self, call: Call) -> bool:
        """Whether any row of the last of ``calls`` steps (with most columns) has a bad status."""
        self._rewind(0)
        outs = [call(0) for _ in range(self.calls)]
        status = getattr(outs[-1], "status", None)
        return status is not None and status.numel() > 0 and bool(status.ne(0).any())


def main() -> None:
    """Run the named cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="small sizes")
    options = parser.parse_args()
    worker.load()
    worker.go_through(options.cases, lambda name: run_case(name, options.device, options.toy))


if __name__ == "__main__":
    main()
