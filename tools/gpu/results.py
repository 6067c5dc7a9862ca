# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.gpu.results FOLDER ... [--to FILE]``: one results file from checks' folders.

Rows of ``benchmark.jsonl`` become ``cases``; those of ``timings.jsonl`` become ``timings``; smoke
cases, tests and stages keep their outcomes. The default file is named after the GPU, in
``benchmarks/results/``. Files of long benchmarks (training, models, loss) bring their own rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from .processes import ROOT
from .records import read_lines

RESULTS = ROOT / "benchmarks" / "results"
_PARTS = ("loss", "models", "training")
_ROWS_OF_PARTS = ("cases", "loss", "generate", "training", "failures")


def gather(folders: list[Path]) -> dict[str, Any]:
    """The content of the folders as one results file.

    Raises:
        ValueError: no folder describes its machine, or two are from different GPUs or sources.
    """
    stages = [row for folder in folders for row in read_lines(folder / "stages.jsonl")]
    machines = [row["environment"] for row in stages if "environment" in row]
    if not machines:
        raise ValueError(f"no machine is described in {', '.join(map(str, folders))}")
    sources = {(m["device"], m["csrc_sha256"]) for m in machines}
    if len(sources) > 1:
        raise ValueError(f"the folders must be of one GPU and one csrc/, got {sorted(sources)}")
    found: dict[str, Any] = {**machines[0], "quick": False, "cases": [], "failures": []}
    found |= {"loss": [], "generate": []}
    for folder in folders:
        _add_folder(found, folder)
    found["steps"] = [row for row in stages if "outcome" in row]
    found["read_gb_per_s"] = max((r["read_gb_per_s"] for r in found["cases"]), default=None)
    copies = [row.get("gb_per_s", 0) for row in found.get("timings", []) if _is_copy(row)]
    found["copy_gb_per_s"] = max(copies, default=None)
    return found


def _add_folder(found: dict[str, Any], folder: Path) -> None:
    for row in read_lines(folder / "benchmark.jsonl"):
        if "contender" in row:
            key = "generate" if "tokens_per_s_median" in row else "cases"
            found[key].append({k: v for k, v in row.items() if k not in ("stage", "case")})
        elif "too_slow" in row:
            found["failures"].append(row["too_slow"])
    for name in ("smoke", "timings"):
        rows = [_without_stage(row) for row in read_lines(folder / f"{name}.jsonl")]
        if rows:
            found[name] = found.get(name, []) + rows
    tests = [row for row in read_lines(folder / "tests.jsonl") if "outcome" in row]
    if tests:
        counts = found.setdefault("tests", {})
        for row in tests:
            counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        bad = [_without_stage(row) for row in tests if row["outcome"] not in ("passed", "skipped")]
        found["tests_not_passed"] = found.get("tests_not_passed", []) + bad
    for part in _PARTS:
        path = folder / f"{part}.json"
        for key, rows in (json.loads(path.read_text()) if path.is_file() else {}).items():
            if key in _ROWS_OF_PARTS:
                found[key] = found.get(key, []) + rows


def _is_copy(row: dict[str, Any]) -> bool:
    return row.get("contender") == "copy"


def _without_stage(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "stage"}


def file_name(device: str, suffix: str = "") -> str:
    """ "NVIDIA H200" -> "nvidia-h200.json"."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}{suffix}.json"


def main(arguments: list[str] | None = None) -> None:
    """Write the file atomically."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--to", type=Path, metavar="FILE")
    parser.add_argument(
        "--models", action="store_true", help="the default file is <gpu>-models.json"
    )
    options = parser.parse_args(arguments)
    found = gather(options.folders)
    suffix = "-models" if options.models else ""
    target = options.to or RESULTS / file_name(found["device"], suffix)
    part = target.with_name(f".{target.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, target)
    print(target)


if __name__ == "__main__":
    main()
