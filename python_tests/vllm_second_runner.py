# SPDX-License-Identifier: Apache-2.0
"""FOLDER OUT K: run jobs in vLLM's second model runner, and write the results to a file.

GPUs take this runner. Its kernels are written in Triton, of which vLLM's CPU wheel has no backend.
Here they run in Triton's interpreter, in NumPy. This shows that the code is right, not that it
compiles for a GPU. It is a script because vLLM and Triton read their settings when imported.
"""

import json
import os
import sys
import types

# Before triton is imported: its library's functions (max, sum, ...) are interpreted or not from
# their definition on.
os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import triton.backends

# vLLM asks whether Triton has a backend for CPUs. The interpreter never uses it.
triton.backends.backends["cpu"] = types.SimpleNamespace(
    compiler=None, driver=types.SimpleNamespace(is_active=lambda: True)
)

from serving_cases import NEW, jobs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm_cases import answers, engine, metric  # noqa: E402


def main(folder: str, out: str, num_objectives: str) -> None:
    llm = engine(folder)
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    work = jobs(int(num_objectives))
    found = answers(llm, work, NEW // 2)
    again = answers(llm, work[14:17], NEW // 2)  # of 260 tokens, which are in the cache now
    try:
        answers(llm, [(work[0][0], {"strenght": 1.0})], 1)
        refused = ""
    except VLLMValidationError as error:
        refused = str(error)
    results = {
        "runner": type(runner).__module__,
        "found": [(tokens, alpha.tolist()) for tokens, alpha in found],
        "again": [(tokens, alpha.tolist()) for tokens, alpha in again],
        "hits": metric(llm, "prefix_cache_hits"),
        "refused": refused,
    }
    with open(out, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
