# SPDX-License-Identifier: Apache-2.0
"""What a gated head costs in vLLM: the same engine with and without it, on the CPU.

    python benchmarks/vllm_serving.py RESULTS.json

This needs vLLM's environment (`make vllm-env`). The backbone is a random Llama with d = 1024, 24
layers and V = 32000, in bfloat16. For each head, a plain and a gated engine run alternately in this
process.

Figures are CPU seconds of this process with one thread: other programs on the machine disturb them
less than wall-clock time. They are given for a decode step at B requests (the time of a text of 25
tokens minus that of 1 token, divided by 24), and for a prompt of 256 tokens. ratio: the plain
engine's time divided by the gated one's, as the median and the extremes over all rounds; 1 means
that the gated head costs nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

import dualhead_ext as dh
from dualhead_ext.files.atomic import write_durably
from dualhead_ext.measurement.machine import describe
from dualhead_ext.model.export import export

VOCAB, HIDDEN, NEW, PROMPT, TURNS = 32000, 1024, 24, 256, 7
SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2816}
SHAPE |= {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8}
HEADS: dict[str, dict[str, Any]] = {
    "full": {"reward_head": "full", "gate": "attention"},
    "embedding": {"reward_head": "embedding", "reward_rank": 16, "gate": "attention"},
    "embedding, rank 0, fixed gate": {
        "reward_head": "embedding",
        "reward_rank": 0,
        "gate": "fixed",
    },
}
WORK = {
    "decode, B = 1": (1, 16, NEW),
    "decode, B = 8": (8, 16, NEW),
    "prefill, B = 1": (1, PROMPT, 0),
}


def folders(place: Path) -> dict[str, Path]:
    """The folder of each head's export."""
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPE)).bfloat16()
    backbone.save_pretrained(place / "backbone")
    found = {}
    for i, (name, config) in enumerate(HEADS.items()):
        model = dh.DualHeadForCausalLM.from_backbone(place / "backbone", trial=False, **config)
        with torch.no_grad():
            model.lm_head_module.reward_head.bias.add_(0.01) if "embedding" in name else None
        model.save_pretrained(place / f"heads{i}")
        found[name] = export(place / f"heads{i}", place / f"served{i}", place / "backbone")
    return found


def engine(folder: Path, **options: Any) -> LLM:
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 8}
    sizes |= {"enable_prefix_caching": False}
    return LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True,
        **sizes | options,
    )  # fmt: skip


def seconds(llm: LLM, batch: int, length: int, new: int) -> float:
    """CPU seconds of ``batch`` prompts of ``length`` tokens and ``new`` + 1 tokens for each."""
    inputs = [
        {"prompt_token_ids": [(7 * i + j) % VOCAB for j in range(length)]} for i in range(batch)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
    start = time.process_time()
    llm.generate(inputs, params, use_tqdm=False)
    return time.process_time() - start


def measure(llm: LLM, batch: int, length: int, new: int) -> float:
    """Milliseconds of a decode step, or of a prompt if ``new`` is 0."""
    first = seconds(llm, batch, length, 0)
    return 1e3 * first if new == 0 else 1e3 * (seconds(llm, batch, length, new) - first) / new


def main(path: str) -> None:
    found = describe("cpu") | {"shape": SHAPE, "turns": TURNS, "rows": []}
    with tempfile.TemporaryDirectory() as place:
        for name, folder in folders(Path(place)).items():
            plain = engine(folder, hf_overrides={"architectures": ["LlamaForCausalLM"]})
            gated = engine(folder)
            for work, sizes in WORK.items():
                both = [(measure(plain, *sizes), measure(gated, *sizes)) for _ in range(TURNS + 1)]
                ratios = [a / b for a, b in both[1:]]  # the first round is the warm-up
                row = {
                    "reward_head": name,
                    "work": work,
                    "plain_ms": round(statistics.median(a for a, _ in both[1:]), 3),
                    "gated_ms": round(statistics.median(b for _, b in both[1:]), 3),
                    "ratio": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                }
                print(row, flush=True)
                found["rows"].append(row)
            for llm in (plain, gated):
                llm.llm_engine.engine_core.shutdown()
            del plain, gated, llm
            write_durably(Path(path), json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
