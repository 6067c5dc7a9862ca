# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the vLLM plugin.

They are engines and what they answer. The requests are those of `serving_cases`.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

# Set before vllm is imported, since it reads them only once.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(SETTINGS)

import torch  # noqa: E402
from serving_cases import NEW  # noqa: E402


def engine(folder: Path, **options: Any) -> Any:
    """A small fp32 engine. Its chunks of 64 split prompts and mix them with decoding."""
    from vllm import LLM

    sizes = {
        "dtype": "float32",
        "max_model_len": 320,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    return LLM(str(folder), **sizes | options)


def close(llm: Any) -> None:
    """Free an engine of this process."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def answers(llm: Any, work: list[tuple[list[int], dict[str, Any]]], new: int = NEW) -> list:
    """(tokens, the alpha of each) for every job, all at once."""
    from vllm import SamplingParams

    from dualhead_ext.vllm.alpha import take_alpha

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True,
            extra_args=own | {"return_alpha": f"job {i}"},
        )
        for i, (_, own) in enumerate(work)
    ]  # fmt: skip
    inputs = [{"prompt_token_ids": ids} for ids, _ in work]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [
        (list(out.outputs[0].token_ids), torch.tensor(take_alpha(llm, out, f"job {i}")))
        for i, out in enumerate(outputs)
    ]


def metric(llm: Any, name: str) -> float:
    """The value of one of vLLM's counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")
