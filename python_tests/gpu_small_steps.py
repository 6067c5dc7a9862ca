# SPDX-License-Identifier: Apache-2.0
"""Small decode steps and losses on the GPU, every path once: what compute-sanitizer watches. No
test by itself: exits with 1 if a row's status or a gradient is not what it should be.

Rows of a multiple of 8 numbers (of 16 in a quantised format) take the decode step's streaming path,
others the plain one.
"""

from __future__ import annotations

import sys

import torch
from decode_cases import make_case, quantized
from loss_cases import OPTION_SETS, batch

from dualhead_ext import ops
from dualhead_ext.functional import dual_head_loss
from dualhead_ext.quantization import FORMATS

SIZES = [  # B, d, V, K, options
    (1, 1, 1, 1, {"S": 1}),
    (3, 31, 63, 2, {"bias": True, "objective_weights": True}),
    (2, 64, 65, 1, {"H": 8, "d_k": 48, "S": 70, "controls": True}),
    (9, 130, 257, 1, {"gate": "logit", "sample": True, "logit_softcap": 30.0}),
    (5, 72, 1003, 1, {"mix_probs": True, "sample": True, "record_attention": True}),
    (17, 264, 150, 2, {"bias": True, "H": 2, "d_k": 8, "S": 200}),
    (64, 640, 70, 3, {"sample": True, "S": 130}),
    (66, 64, 70, 2, {"sample": True, "bias": True, "S": 9}),
]
QUANTIZED_SIZES = [  # d a multiple of 128 where int4 needs it
    (1, 128, 65, 1, {"controls": True}),
    (9, 384, 70, 2, {"bias": True, "sample": True}),
    (64, 256, 150, 1, {"mix_probs": True, "S": 130}),
]
FILTERS = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01}


def steps_are_fine(dtype: torch.dtype, device: str, format: str | None = None) -> bool:
    """Every size of the decode step; with ``format``, of quantised heads."""
    fine = True
    for seed, (B, d, V, K, options) in enumerate(QUANTIZED_SIZES if format else SIZES):
        case = make_case(seed, B, d, V, K, dtype, **options)
        if format:
            case = quantized(case, format)
        if options.get("sample"):
            for name, value in FILTERS.items():
                kind = torch.int32 if name == "top_k" else torch.float32
                case[name] = torch.full((B,), value, dtype=kind)
        case = _on(device, case)
        with torch.no_grad():
            status = ops.decode_step(**case).status
        fine &= bool(status.eq(0).all())
    return fine


def losses_are_fine(device: str) -> bool:
    """Every set of options of the training loss, forward and backward."""
    fine = True
    for seed, options in enumerate(OPTION_SETS.values()):
        case = _on(device, batch(seed, rows=6, length=7, d=9, vocab=67, dtype=torch.float32))
        weight = case["reward_weight"].requires_grad_()
        dual_head_loss(**case, **options).loss.backward()
        fine &= bool(weight.grad.isfinite().all())
    return fine


def _on(device: str, case: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


if __name__ == "__main__":
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    done = [
        steps_are_fine(dtype, "cuda", format) for format in (None, *FORMATS) for dtype in dtypes
    ]
    done.append(losses_are_fine("cuda"))
    torch.cuda.synchronize()
    sys.exit(0 if all(done) else 1)
