# SPDX-License-Identifier: Apache-2.0
"""``make gpu-models``: the long benchmarks of a GPU, in under ten minutes, into
``benchmarks/results/<gpu>-models.json``: training steps and decoding with models of 7B size, and
the training loss in all its settings (`dualhead bench --device cuda --part training models loss`).

As ``make gpu-check``: it builds for this GPU, each step has a time limit of its own, and its
outcome is in the file even if a later one fails. Exits with 1 if any did not pass, and with 3 and
one sentence where there is no GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu_check import Results, run
from gpu_steps import Step, of_command

# Part of the benchmark -> seconds it may take. The loss, which leaves its rows case by case, comes
# last: whatever the others take is not lost for it.
LIMITS = {"training": 100, "models": 300, "loss": 260}
# Options of one part. The loss has seven cases, of 10 times as many seconds.
OPTIONS = {"loss": ["--seconds", "0.5"]}


class Parts(Results):
    """The results of one benchmark for each part, in one file."""

    target, seconds = "gpu-models", 580  # of ten minutes

    def file_of(self, part: str) -> Path:
        """Where a part leaves what it measured."""
        return self.part.with_name(f"{part}.json")

    def measured(self) -> dict[str, Any]:
        """What the parts have left in files so far: the rows and failures of all, together."""
        found: dict[str, Any] = {"cases": []}
        for path in (self.file_of(part) for part in LIMITS):
            for key, value in (json.loads(path.read_text()) if path.is_file() else {}).items():
                rows = isinstance(value, list) and isinstance(found.get(key), list)
                found[key] = found[key] + value if rows else value
        return found


def plan(results: Parts) -> list[list[Step]]:
    """The steps after the build, each alone on the GPU."""
    return [
        [Step(part, limit, of_command(command(results, part)))] for part, limit in LIMITS.items()
    ]


def command(results: Parts, part: str) -> list[str]:
    """What measures one part."""
    bench = [sys.executable, "-m", "dualhead_ext.cli", "bench", "--device", "cuda", "--part", part]
    return [*bench, *OPTIONS.get(part, []), "--json", str(results.file_of(part))]


if __name__ == "__main__":
    sys.exit(run(Parts, plan, "-models"))
