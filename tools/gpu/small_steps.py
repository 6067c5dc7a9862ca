# SPDX-License-Identifier: Apache-2.0
"""Small decode steps and losses on the GPU, every path once, for compute-sanitizer.

``python -m tools.gpu.small_steps`` prints "fine: STEP" for each step that passes, and exits with 1
if a row's status or a gradient is wrong. Rows of a multiple of 8 weights (of 16 in a quantised
format) take the decode step's streaming path, which comes first; others take the plain path.
"""

from __future__ import annotations

import sys

import torch

from .processes import ROOT
from .sanitizers import STEP_IS_FINE

sys.path.insert(0, str(ROOT / "python_tests"))
from decode_cases import make_case, quantized
from loss_cases import OPTION_SETS, batch

from dualhead_ext import ops
from dualhead_ext.functional import dual_head_loss
from dualhead_ext.quantization import FORMATS

SIZES = [  # B, d, V, K, options; streamed
    (2, 64, 65, 1, {"H": 8, "d_k": 48, "S": 70, "controls": True}),
    (5, 72, 1003, 1, {"mix_probs": True, "sample": True, "record_attention": True}),
    (17, 264, 150, 2, {"bias": True, "H": 2, "d_k": 8, "S": 200}),
    (64, 640, 70, 3, {"sample": True, "S": 130}),
    (66, 64, 70, 2, {"sample": True, "bias": True, "S": 9}),
]
PLAIN_SIZES = [
    (1, 1, 1, 1, {"S": 1}),
    (3, 31, 63, 2, {"bias": True, "objective_weights": True}),
    (9, 130, 257, 1, {"gate": "logit", "sample": True, "logit_softcap": 30.0}),
]
QUANTIZED_SIZES = [  # d a multiple of 128 where int4 needs it
    (1, 128, 65, 1, {"controls": True}),
    (9, 384, 70, 2, {"bias": True, "sample": True}),
    (64, 256, 150, 1, {"mix_probs": True, "S": 130}),
]
FILTERS = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01}


def steps_are_fine(sizes: list, dtype: torch.dtype, device: str, format: str | None = None) -> bool:
    """Run every size; with ``format``, on quantised heads."""
    fine = True
    for seed, (B, d, V, K, options) in enumerate(sizes):
        case = make_case(seed, B, d, V, K, dtype, **options)
        if format:
            case = quantized(case, format)
        if options.get("sample"):
            for name, value in FILTERS.items():
                kind = torch.int32 if name == "top_k" else torch.float32
                case[name] = torch.full((B,), value, dtype=kind)
        case = _on(device, case)
        with torch.no_grad():
            status = ops.decode_step(**case).status.cpu()
        fine &= _said(bool(status.eq(0).all()), f"{dtype} {format or 'plain'} B={B} d={d}")
    return fine


def losses_are_fine(device: str) -> bool:
    """Run the training loss with every set of options, forward and backward."""
    fine = True
    for seed, (name, options) in enumerate(OPTION_SETS.items()):
        case = _on(device, batch(seed, rows=6, length=7, d=9, vocab=67, dtype=torch.float32))
        weight = case["reward_weight"].requires_grad_()
        dual_head_loss(**case, **options).loss.backward()
        fine &= _said(bool(weight.grad.isfinite().all()), f"loss {name}")
    return fine


def _said(fine: bool, name: str) -> bool:
    print(f"{STEP_IS_FINE if fine else 'NOT '}{name}", flush=True)
    return fine


def _on(device: str, case: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def main() -> int:
    """Run all steps and losses, the most used first."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    done = [steps_are_fine(SIZES, bf16, "cuda")]
    done += [steps_are_fine(QUANTIZED_SIZES, bf16, "cuda", format) for format in FORMATS]
    done += [losses_are_fine("cuda")]
    done += [steps_are_fine(SIZES, fp16, "cuda"), steps_are_fine(SIZES, fp32, "cuda")]
    done += [steps_are_fine(PLAIN_SIZES, dtype, "cuda") for dtype in (bf16, fp16, fp32)]
    for dtype in (fp16, fp32):
        done += [steps_are_fine(QUANTIZED_SIZES, dtype, "cuda", format) for format in FORMATS]
    torch.cuda.synchronize()
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
