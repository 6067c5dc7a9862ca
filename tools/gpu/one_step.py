# SPDX-License-Identifier: Apache-2.0
"""One decode step for a profiler: ``python -m tools.gpu.one_step CASE`` (of :mod:`tools.gpu.smoke`)
runs a few to warm up and one between cudaProfilerStart and cudaProfilerStop."""

from __future__ import annotations

import sys

import torch

from dualhead_ext import ops

from .smoke import CASES, arguments_of


def main(name: str) -> None:
    """Run one step of a case."""
    made = arguments_of(CASES[name], "cuda")
    made["cache_length"].fill_(255)
    with torch.no_grad():
        for _ in range(3):
            ops.decode_step(**made)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        ops.decode_step(**made)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1])
