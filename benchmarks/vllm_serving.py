# SPDX-License-Identifier: Apache-2.0
"""What a gated head costs in vLLM: the same engine with and without it, on the CPU.

    python benchmarks/vllm_serving.py RESULTS.json --head full --work decode-1

This needs vLLM's environment (`make vllm-env`). One head and one kind of work take a few minutes;
further calls add to the file. A plain and a gated engine run alternately in this process.

decode-B: milliseconds of a decode step of B requests; prefill: of a prompt of 256 tokens. The two
engines take turns, one step each, and a round is 24 steps of both or one prompt. `engine_cost` says
what the figures are.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING"}

from engine_cost import HEADS, SIZES, add_row, backbone, gated, options, ratio_of
from vllm import LLM, SamplingParams

from dualhead_ext.model.export import export

# (requests, tokens of a prompt, decode steps)
WORK = {"decode-1": (1, 16, 24), "decode-8": (8, 16, 24), "prefill": (1, 256, 0)}


def engine(folder: Path, **more: Any) -> LLM:
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 8}
    sizes |= {"enable_prefix_caching": False}
    return LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True, **sizes | more
    )


def share_backbone(plain: LLM, gated: LLM) -> None:
    """Both engines multiply with the same packed matrices. Equal weights at other places in memory
    differ by up to a fifth in time, from process to process.
    """
    first, second = (
        dict(llm.llm_engine.model_executor.driver_worker.model_runner.model.named_modules())
        for llm in (plain, gated)
    )
    packed = [name for name, layer in first.items() if hasattr(layer, "cpu_linear")]
    assert packed, "vLLM has changed how it calls a packed matrix"
    for name in packed:
        second[name].cpu_linear = first[name].cpu_linear


def milliseconds(
    engines: Sequence[Any], vocab: int, batch: int, length: int, new: int
) -> list[float]:
    """For each engine: of a decode step, the median of ``new``, or of the prompt if that is 0.
    ``batch`` prompts of ``length`` tokens.
    """
    params = SamplingParams(temperature=0.0, max_tokens=new + 1, ignore_eos=True, detokenize=False)
    first = []
    for llm in engines:
        start = time.process_time()
        for i in range(batch):
            ids = [(7 * i + j) % vocab for j in range(length)]
            llm.add_request(str(i), {"prompt_token_ids": ids}, params)
        llm.step()
        first.append(1e3 * (time.process_time() - start))
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(new):
        for llm, found in zip(engines, times, strict=True):
            start = time.process_time()
            llm.step()
            found.append(1e3 * (time.process_time() - start))
    assert not any(llm.has_unfinished_requests() for llm in engines)
    return first if new == 0 else [statistics.median(found) for found in times]


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
            share_backbone(plain, with_head)
            engines = [llm.llm_engine for llm in (plain, with_head)]
            for work in asked.work or WORK:
                both = partial(milliseconds, engines, vocab, *WORK[work])
                row = {"reward_head": head, "work": work}
                add_row(asked.results, asked.size, row | ratio_of(both, asked.rounds))
            for one in engines:
                one.engine_core.shutdown()


if __name__ == "__main__":
    main()
