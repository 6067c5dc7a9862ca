# SPDX-License-Identifier: Apache-2.0
"""Host time of one call of ``ops.decode_step``, in several checkouts, measured in turns.

    python benchmarks/call_overhead.py BEFORE AFTER [--rounds 9] [--json FILE]

Each checkout is a folder with compiled libraries. A round starts a process in each, which measures
the CPU time of the calling thread per call, at one thread: d = 256, V = 4096, B = 1, bf16, with the
attention gate, and the same with V = 8, where little but the call is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = (4096, 8)
CALLS, REPEATS = 50, 40


def measure() -> None:
    """Print the minimum microseconds per call for each size, in this process."""
    import torch

    from dualhead_ext import ops

    torch.set_num_threads(1)
    d, H, d_k, S = 256, 8, 48, 512
    bf16 = {"dtype": torch.bfloat16}
    found = {}
    for V in SIZES:
        generator = torch.Generator().manual_seed(0)
        length = torch.zeros(1, dtype=torch.int32)

        def normal(*shape, generator=generator):
            return torch.randn(*shape, generator=generator)

        arguments = {
            "hidden": normal(1, d).to(**bf16),
            "lm_weight": normal(V, d).to(**bf16),
            "reward_weight": normal(1, V, d).to(**bf16),
            "q_weight": normal(H * d_k, d).to(**bf16),
            "k_weight": normal(H * d_k, d).to(**bf16),
            "u_weight": normal(H, d),
            "gate_bias": normal(1),
            "cache_k": torch.zeros(1, H, S, d_k, **bf16),
            "cache_u": torch.zeros(1, H, S),
            "cache_valid": torch.zeros(1, S, dtype=torch.bool),
            "cache_length": length,
        }
        times = []
        with torch.no_grad():
            for _ in range(REPEATS):
                length.zero_()
                start = time.thread_time()
                for _ in range(CALLS):
                    ops.decode_step(**arguments)
                times.append((time.thread_time() - start) / CALLS * 1e6)
        found[V] = min(times)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = {
        str(path): {str(V): [] for V in SIZES} for path in options.checkouts
    }
    for _ in range(options.rounds):
        for path, of_path in times.items():
            environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, __file__, "--measure"],
                env=environment, check=True, capture_output=True, text=True,
            )  # fmt: skip
            for V, microseconds in json.loads(done.stdout.splitlines()[-1]).items():
                of_path[V].append(microseconds)
    results = []
    for path in options.checkouts:
        commit = subprocess.run(
            ["git", "-C", str(path), "rev-parse", "--short", "HEAD"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        for V, values in times[str(path)].items():
            row = {
                "commit": commit,
                "V": int(V),
                "us": round(statistics.median(values), 1),
                "us_min": round(min(values), 1),
                "us_max": round(max(values), 1),
                "rounds": len(values),
            }
            results.append(row)
            print(row)
    if options.json:
        from dualhead_ext.measurement import machine

        record = {"machine": machine.describe(), "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["--measure"] else main()
