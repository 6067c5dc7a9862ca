# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of ``generate()`` on SmolLM2-135M-Instruct: the plain model against the same
model with a reward head that is a correction.

    python benchmarks/corrections.py --json benchmarks/results/corrections.json

The plain model runs transformers' own loop, the gated ones the fused loop, greedily. Contenders
take turns, call by call, and medians are compared: see :mod:`dualhead_ext.measurement.timing`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import dualhead_ext as dh
from dualhead_ext.bench import models
from dualhead_ext.measurement import machine
from dualhead_ext.measurement.timing import Contender, alternate, ratio
from dualhead_ext.model.builtin_backbones import backbone_path

PROMPT_TOKENS = 32


def gated(plain: Any, kind: str, rank: int) -> Any:
    """A twin of the model with a head whose gate and correction are at work."""
    model = dh.DualHeadForCausalLM.from_backbone(
        models.twin(plain), reward_head=kind, reward_rank=rank
    )
    head = model.lm_head_module
    with torch.no_grad():
        for parameter in (*head.reward_head.parameters(), *head.gate.parameters()):
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender and batch size."""
    dtype = getattr(torch, arguments.dtype)
    path = backbone_path(arguments.backbone)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    plain.generation_config.eos_token_id = plain.config.eos_token_id = None
    torch.manual_seed(0)
    heads = {"embedding": 4} if arguments.only_embedding else {"embedding": 4, "lowrank": 16}
    systems = {"plain": plain} | {kind: gated(plain, kind, rank) for kind, rank in heads.items()}
    options = {"max_new_tokens": arguments.tokens, "do_sample": False, "pad_token_id": 0}
    rows = []
    for batch in arguments.batch:
        ids = torch.randint(5, plain.config.vocab_size, (batch, PROMPT_TOKENS))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def call(model: Any, copy: int, inputs: dict[str, Any] = inputs) -> None:
            model.generate(**inputs, **options)

        contenders = [Contender(name, partial(call, model)) for name, model in systems.items()]
        timings = alternate(
            contenders, seconds=arguments.seconds, min_rounds=arguments.rounds, warmup=1
        )
        for name, timing in timings.items():
            against = ratio(timings["plain"], timing)
            rows.append(
                {
                    "contender": name,
                    "rank": heads.get(name),
                    "B": batch,
                    "dtype": arguments.dtype,
                    "new_tokens": arguments.tokens,
                    "tokens_per_s_median": batch * arguments.tokens / timing.us_median * 1e6,
                    "speed_against_plain": against.value,
                    "speed_low": against.low,
                    "speed_high": against.high,
                    "rounds": timing.repeats,
                }
            )
            print(
                f"B={batch} {name:<10} {rows[-1]['tokens_per_s_median']:>7.1f} tokens/s, "
                f"{against.value:.3f} of plain's ({against.low:.3f}..{against.high:.3f})",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2", help="(default smollm2)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a call")
    parser.add_argument("--rounds", type=int, default=15, help="at least so many")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each batch size")
    parser.add_argument("--only-embedding", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    rows = run(arguments)
    if arguments.json:
        found = {"machine": machine.describe(), "generate": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
