# SPDX-License-Identifier: Apache-2.0
"""Smoke tests: each path of the decode step once at a real size, and the loss. They must launch,
end, and agree with :mod:`dualhead_ext.reference` in float64.

``python -m tools.gpu.smoke CASE ...``. The check runs each case in its own process, because after a
CUDA error nothing in the same process works any more.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

from . import worker
from .records import FAILED, PASSED

H, D_K, COLUMNS = 8, 48, 300  # the gate's heads, their size, cache columns
REPEATS = 50

# Allowed difference of logits from float64 at the same alpha, relative to the largest logit; sums
# are fp32. Alpha also depends on the rounding of the new key to the cache's dtype.
LOGITS_TOLERANCE, ALPHA_TOLERANCE = 2e-3, 5e-3
# Beyond 64 rows products are GEMMs. Their results may be rounded to bf16, and what a correction
# multiplies is.
GEMM_TOLERANCE = 1e-2
LOSS_TOLERANCE = 2e-3  # relative, of the loss and of gradients in fp32


@dataclass(frozen=True)
class Case:
    """One path: batch size, dtype of the hidden states, format of quantised heads, number of
    objectives, options of the step ("filters": sampled with all filters), kind of reward head."""

    B: int = 1
    dtype: str = "bfloat16"
    format: str | None = None
    K: int = 1
    d: int = 4096
    V: int = 32000
    options: dict[str, Any] = field(default_factory=dict)
    reward_head: str = "full"


CASES: dict[str, Case | None] = {
    "bf16-1": Case(),
    "bf16-9": Case(9),
    "bf16-64": Case(64),
    "int8-1": Case(format="int8"),
    "int4-1": Case(format="int4"),
    "fp8-1": Case(format="fp8"),
    "int8-9": Case(9, format="int8"),
    "int4-9": Case(9, format="int4"),
    "fp8-9": Case(9, format="fp8"),
    "fp16-1": Case(dtype="float16"),
    "objectives-2": Case(2, K=3),
    "probs-3": Case(3, options={"mix_probs": True}),
    "filters-4": Case(4, options={"filters": True}),
    "attention-2": Case(2, options={"record_attention": True}),
    "bf16-8192x128256": Case(d=8192, V=128256),
    "bf16-66": Case(66),
    "fp32-1": Case(dtype="float32"),
    "odd-3": Case(3, d=77, V=1003),
    "embedding-1": Case(reward_head="embedding"),
    "embedding-9": Case(9, K=2, reward_head="embedding"),
    "embedding-33": Case(33, reward_head="embedding"),
    "embedding-66": Case(66, K=2, reward_head="embedding"),
    "embedding-probs-3": Case(3, reward_head="embedding", options={"mix_probs": True}),
    "embedding-int8-1": Case(format="int8", reward_head="embedding"),
    "embedding-int4-9": Case(9, format="int4", reward_head="embedding"),
    "embedding-fp32-2": Case(2, dtype="float32", reward_head="embedding"),
    "lowrank-1": Case(reward_head="lowrank"),
    "lowrank-9": Case(9, K=2, reward_head="lowrank"),
    "lowrank-66": Case(66, reward_head="lowrank"),
    "lowrank-int8-1": Case(format="int8", reward_head="lowrank"),
    "loss": None,
}
RANKS = {"embedding": 16, "lowrank": 64}
LOSS_SIZES = (8, 64, 1024, 32000)  # rows, length, d, V


def run_case(name: str, device: str, toy: bool) -> dict[str, Any]:
    """Run a case; returns the fields of its record. ``toy``: small sizes, to test without a GPU."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    case = CASES[name]
    if case is None:
        return _run_loss(device, (4, 6, 16, 67) if toy else LOSS_SIZES)
    if toy:
        case = replace(case, d=min(case.d, 128), V=257)
    with torch.no_grad():
        return _run_step(case, device, 3 if toy else REPEATS)


def arguments_of(case: Case, device: str) -> dict[str, Any]:
    """Random arguments of ``ops.decode_step``, drawn on the device."""
    import torch

    from dualhead_ext.quantization import quantize

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=scale)

    B, d, V, f32 = case.B, case.d, case.V, torch.float32
    made = {
        "hidden": normal(B, d),
        "lm_weight": normal(V, d, scale=2 * d**-0.5),
        **_reward_head(case, normal),
        "q_weight": normal(H * D_K, d, scale=d**-0.5),
        "k_weight": normal(H * D_K, d, scale=d**-0.5),
        "u_weight": normal(H, d, scale=d**-0.5, dtype=f32),
        "gate_bias": normal(1, dtype=f32),
        "cache_k": normal(B, H, COLUMNS, D_K),
        "cache_u": normal(B, H, COLUMNS, dtype=f32),
        "cache_valid": torch.rand(B, COLUMNS, device=device) > 0.2,
        "cache_length": (torch.rand(B, device=device) * (COLUMNS - 1)).int(),
    }
    if case.format is not None:
        for head in ("lm", "reward") if case.reward_head == "full" else ("lm",):
            q, scale = quantize(made[f"{head}_weight"], case.format)
            made |= {f"{head}_weight": q, f"{head}_scale": scale}
    options = dict(case.options)
    if options.pop("filters", False):
        filters = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01}
        made |= {name: torch.full((B,), value, device=device) for name, value in filters.items()}
        made["top_k"] = torch.full((B,), 50, dtype=torch.int32, device=device)
        made["seeds"] = torch.arange(B, device=device)
        made["draws"] = torch.zeros(B, dtype=torch.int64, device=device)
    return made | options


def _reward_head(case: Case, normal: Any) -> dict[str, Any]:
    K, d, V = case.K, case.d, case.V
    if case.reward_head == "full":
        return {"reward_weight": normal(K, V, d, scale=2 * d**-0.5)}
    r, n = RANKS[case.reward_head], d if case.reward_head == "embedding" else V
    return {
        "reward_head": case.reward_head,
        "reward_down": normal(K, r, d, scale=d**-0.5),
        "reward_up": normal(K, n, r, scale=0.5 * r**-0.5),
        "reward_bias": normal(K, n, scale=0.5),
    }


_STATE = ("cache_k", "cache_u", "cache_valid", "cache_length", "draws")  # what a step writes


def _on_copies(step: Any, made: dict[str, Any]) -> Any:
    return step(**{k: v.clone() if k in _STATE else v for k, v in made.items()})


def _in_double(made: dict[str, Any]) -> dict[str, Any]:
    import torch

    from dualhead_ext.quantization import format_of

    def widened(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating and format_of(value) is None else value

    return {name: widened(value) for name, value in made.items()}


def _run_step(case: Case, device: str, repeats: int) -> dict[str, Any]:
    import torch

    from dualhead_ext import ops, reference

    if not ops.kernel_for(device, getattr(torch, case.dtype)):
        return {"outcome": FAILED, "detail": f"no kernel for {case.dtype} on {device}"}
    worker.phase("arguments")
    made = arguments_of(case, device)
    _wait(device)
    worker.phase("first launch")
    got = _on_copies(ops.decode_step, made)
    _wait(device)
    worker.phase("reference")
    found = _compare(got, made, reference)
    worker.phase("repeats")
    found["unequal_repeats"] = sum(
        not _same(_on_copies(ops.decode_step, made), got) for _ in range(repeats)
    )
    worker.phase("graph")
    if device == "cuda":
        found["unequal_replays"] = _unequal_replays(got, made, ops, repeats)
    tolerance = GEMM_TOLERANCE if case.B > 64 else LOGITS_TOLERANCE
    problems = [
        sentence
        for bad, sentence in (
            (found["bad_status"], "a status is not 0"),
            (not found["alpha_error"] <= ALPHA_TOLERANCE, "alpha is wrong"),
            (not found["logits_error"] <= tolerance, "logits are wrong"),
            (found.get("attention_error", 0) > ALPHA_TOLERANCE, "attention is wrong"),
            (found["wrong_tokens"] > case.B // 8, "tokens are wrong"),
            (found["unequal_repeats"], "repeats differ"),
            (found.get("unequal_replays"), "a graph's replays differ"),
        )
        if bad
    ]
    outcome = {"outcome": FAILED, "detail": "; ".join(problems)} if problems else {}
    return {"outcome": PASSED, **found, **outcome}


def _compare(got: Any, made: dict[str, Any], reference: Any) -> dict[str, Any]:
    """Errors relative to float64, with the mixture at our alpha; tokens are checked against our
    logits."""
    import torch

    truth = _on_copies(reference.decode_step, _in_double(made) | {"alpha": got.alpha.double()})
    scale = truth.logits.abs().max().item()
    if made.get("mix_probs"):  # log-probabilities: use absolute differences
        scale = max(1.0, scale / 4)
    alpha = torch.sigmoid(truth.gate_logit)
    filters = {n: made.get(n) for n in ("temperature", "top_k", "top_p", "min_p")}
    if "seeds" in made:
        token = reference.sample_token(got.logits, made["seeds"], made["draws"], **filters)
    else:
        token = got.logits.argmax(-1)
    found = {
        "bad_status": int(got.status.ne(0).sum()),
        "alpha_error": (got.alpha - alpha).abs().max().item(),
        "logits_error": (got.logits - truth.logits).abs().max().item() / scale,
        "wrong_tokens": int(got.token.ne(token).sum()),
    }
    if got.attention.numel():
        found["attention_error"] = (got.attention - truth.attention).abs().max().item()
    return found


def _bits(out: Any) -> list[Any]:
    import torch

    return [x if not x.is_floating_point() else x.view(torch.int32) for x in out if x.numel()]


def _same(a: Any, b: Any) -> bool:
    import torch

    return all(torch.equal(x, y) for x, y in zip(_bits(a), _bits(b), strict=True))


def _unequal_replays(got: Any, made: dict[str, Any], ops: Any, repeats: int) -> int:
    import torch

    mine = {k: v.clone() if k in _STATE else v for k, v in made.items()}

    def rewind() -> None:
        for name in _STATE:
            if name in made:
                mine[name].copy_(made[name])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.decode_step(**mine)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.decode_step(**mine)
    unequal = 0
    for _ in range(repeats):
        rewind()
        graph.replay()
        unequal += not _same(captured, got)
    return unequal


def _run_loss(device: str, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Compare loss and gradients in fp32 with plain PyTorch in float64."""
    import torch

    from dualhead_ext import ops
    from dualhead_ext.functional import dual_head_loss

    rows, length, d, V = sizes
    torch.manual_seed(0)
    shape = (rows, length)
    leaves = {
        "hidden": torch.randn(*shape, d, device=device),
        "gate_logit": torch.randn(shape, device=device),
        "reward_weight": torch.randn(V, d, device=device) * d**-0.5,
        "lm_weight": torch.randn(V, d, device=device) * d**-0.5,
    }
    labels = torch.randint(0, V, shape, device=device)
    mask = torch.rand(shape, device=device) > 0.3
    if not ops.loss_rows_kernel_for(torch.empty(1, V, device=device)):
        return {"outcome": FAILED, "detail": f"no kernel of the loss on {device}"}
    results = []
    for dtype in (torch.float32, torch.float64):  # float64 uses plain PyTorch
        worker.phase(f"loss in {dtype}")
        mine = {n: leaf.to(dtype, copy=True).requires_grad_() for n, leaf in leaves.items()}
        out = dual_head_loss(labels=labels, mask=mask, **mine)
        out.loss.backward()
        _wait(device)
        gradients = {name: leaf.grad for name, leaf in mine.items()}
        results.append({"loss": out.loss.detach(), **gradients})
    got, truth = results
    errors = {
        name: ((got[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth
    }
    worst = max(errors, key=errors.__getitem__)
    fine = all(error <= LOSS_TOLERANCE for error in errors.values())
    detail = {} if fine else {"detail": f"{worst} is off by {errors[worst]:.3g}"}
    return {"outcome": PASSED if fine else FAILED, "errors": errors, **detail}


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


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
