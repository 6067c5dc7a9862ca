# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the two engines share: the backbone, the heads, and the results file. The
file grows by a piece of a few minutes at a time.

The figures are CPU seconds of this process with one thread: other programs on the machine disturb
them less than wall-clock time. ratio: the plain engine's time divided by the gated one's, as the
median and the extremes over all rounds, in which both run one after the other; 1 means that the
gated head costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dualhead_ext as dh
from dualhead_ext.files.atomic import write_durably
from dualhead_ext.measurement.machine import describe

# "tiny" shows that a script runs; do not quote its figures.
SIZES: dict[str, dict[str, int]] = {
    "full": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
HEADS: dict[str, dict[str, Any]] = {
    "full": {"reward_head": "full", "gate": "attention"},
    "embedding": {"reward_head": "embedding", "reward_rank": 16, "gate": "attention"},
    "constant": {"reward_head": "embedding", "reward_rank": 0, "gate": "fixed"},
}


def options(text: str, works: Iterable[str]) -> argparse.Namespace:
    """The command line of a benchmark. Without --head and --work, everything is measured."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=kind)
    parser.add_argument("results", type=Path, help="file to which the rows are added")
    parser.add_argument("--head", choices=HEADS, action="append")
    parser.add_argument("--work", choices=tuple(works), action="append")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def backbone(place: Path, size: str) -> Path:
    """A random Llama in bfloat16, saved."""
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=2048, **SIZES[size])
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(place / "backbone")
    return place / "backbone"


def gated(path: Path, head: str) -> Any:
    """The backbone with a reward head that is not zero."""
    model = dh.DualHeadForCausalLM.from_backbone(path, trial=False, **HEADS[head])
    with torch.no_grad():
        for name, parameter in model.lm_head_module.reward_head.named_parameters():
            parameter.add_(0.01 if name == "bias" else 0.0)
    return model


def ratio_of(both: Callable[[], Sequence[float]], rounds: int) -> dict[str, Any]:
    """both: milliseconds of the plain engine and of the gated one, in turns. The first round is the
    warm-up.
    """
    found = [tuple(both()) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in found]
    return {
        "plain_ms": round(statistics.median(a for a, _ in found), 3),
        "gated_ms": round(statistics.median(b for _, b in found), 3),
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "rounds": rounds,
    }


def add_row(path: Path, size: str, row: dict[str, Any]) -> None:
    """Add a row to a results file; it replaces one of the same head and work.

    Raises:
        SystemExit: the file is of another machine, commit, version or size.
    """
    loaded = (sys.modules.get(name) for name in ("transformers", "vllm"))
    packages = {module.__name__: module.__version__ for module in loaded if module}
    new = describe("cpu") | {"packages": packages}
    new |= {"size": size, "shape": SIZES[size], "rows": []}
    found = json.loads(path.read_text()) if path.is_file() else new
    for name in ("device", "commit", "csrc_sha256", "torch", "packages", "size"):
        if found[name] != new[name]:
            raise SystemExit(f"{path}: its {name} is {found[name]}, this is {new[name]}")
    same = ("reward_head", "work")
    kept = [old for old in found["rows"] if any(old[n] != row[n] for n in same)]
    found["rows"] = [*kept, row]
    print(row, flush=True)
    write_durably(path, json.dumps(found, indent=1).encode() + b"\n")
