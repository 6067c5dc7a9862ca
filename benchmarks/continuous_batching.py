# SPDX-License-Identifier: Apache-2.0
"""What a gated head costs in transformers' continuous batching: the same batches with and without
it, on the CPU.

    python benchmarks/continuous_batching.py RESULTS.json --head full --work requests-8

One head and one kind of work take a few minutes; further calls add to the file.

requests-N: N prompts of 16 to 128 tokens with 32 new tokens each, decoded at once; milliseconds per
request, and requests per second. `engine_cost` says what the figures are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine_cost import HEADS, SIZES, add_row, backbone, gated, options, ratio_of
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

WORK = {"requests-1": 1, "requests-8": 8}
NEW = 32


def both_milliseconds(models: Sequence[Any], vocab: int, count: int) -> list[float]:
    """For each model: CPU milliseconds per request."""
    return [milliseconds(model, vocab, count) for model in models]


def milliseconds(model: Any, vocab: int, count: int) -> float:
    prompts = [[(7 * i + j) % vocab for j in range(16 + 16 * (i % 8))] for i in range(count)]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    sizes = ContinuousBatchingConfig(
        page_size=32, num_blocks=8 * count, max_batch_tokens=512, allow_block_sharing=False
    )
    start = time.process_time()
    found = model.generate_batch(prompts, settings, sizes, progress_bar=False)
    passed = time.process_time() - start
    assert all(len(out.generated_tokens) == NEW for out in found.values())
    return 1e3 * passed / count


def main() -> None:
    asked = options(__doc__ or "", WORK)
    vocab = SIZES[asked.size]["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        path = backbone(Path(folder), asked.size)
        plain = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        for head in asked.head or HEADS:
            with_head = gated(path, head)
            for work in asked.work or WORK:
                both = partial(both_milliseconds, (plain, with_head), vocab, WORK[work])
                found = ratio_of(both, asked.rounds)
                rates = {
                    f"{name}_per_s": round(1e3 / found[f"{name}_ms"], 3)
                    for name in ("plain", "gated")
                }
                row = {"reward_head": head, "work": work} | found | rates
                add_row(asked.results, asked.size, row)


if __name__ == "__main__":
    main()
