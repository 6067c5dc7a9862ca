# SPDX-License-Identifier: Apache-2.0
"""What a gated head costs in vLLM: the same engine with and without it, on the CPU.

    python benchmarks/vllm_serving.py RESULTS.json --head full --work decode-1

This needs vLLM's environment (`make vllm-env`). One head and one kind of work take a few minutes;
further calls add to the file. A plain and a gated engine run alternately in this process.

decode-B: milliseconds of a decode step of B requests, the time of a text of 25 tokens minus that of
one token, divided by 24. prefill: milliseconds of a prompt of 256 tokens. `engine_cost` says what
the figures are.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING"}

from engine_cost import HEADS, SIZES, add_row, backbone, gated, options, ratio_of
from vllm import LLM, SamplingParams

from dualhead_ext.model.export import export

# (requests, tokens of a prompt, tokens after the first)
WORK = {"decode-1": (1, 16, 24), "decode-8": (8, 16, 24), "prefill": (1, 256, 0)}


def engine(folder: Path, **more: Any) -> LLM:
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 8}
    sizes |= {"enable_prefix_caching": False}
    return LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, **sizes | more
    )


def seconds(llm: LLM, vocab: int, batch: int, length: int, new: int) -> float:
    """CPU seconds of ``batch`` prompts of ``length`` tokens and ``new`` + 1 tokens for each."""
    inputs = [
        {"prompt_token_ids": [(7 * i + j) % vocab for j in range(length)]} for i in range(batch)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
    start = time.process_time()
    llm.generate(inputs, params, use_tqdm=False)
    return time.process_time() - start


def milliseconds(llm: LLM, vocab: int, batch: int, length: int, new: int) -> float:
    """Of a decode step, or of a prompt if ``new`` is 0."""
    first = seconds(llm, vocab, batch, length, 0)
    if new == 0:
        return 1e3 * first
    return 1e3 * (seconds(llm, vocab, batch, length, new) - first) / new


def main() -> None:
    asked = options(__doc__ or "", WORK)
    vocab = SIZES[asked.size]["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path = backbone(place, asked.size)
        for head in asked.head or HEADS:
            gated(path, head).save_pretrained(place / f"heads-{head}")
            served = export(place / f"heads-{head}", place / f"served-{head}", path)
            with_head = engine(served)
            plain = engine(served, hf_overrides={"architectures": ["LlamaForCausalLM"]})
            for work in asked.work or WORK:
                times = [
                    lambda llm=llm, sizes=WORK[work]: milliseconds(llm, vocab, *sizes)
                    for llm in (plain, with_head)
                ]
                row = {"reward_head": head, "work": work}
                add_row(asked.results, asked.size, row | ratio_of(*times, asked.rounds))
            for llm in (plain, with_head):
                llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
