# SPDX-License-Identifier: Apache-2.0
"""FOLDER OUT: run every job in an engine of two processes, and write the results to a file.

This is a script because vLLM's workers import the main module again.
"""

import json
import sys

from serving_cases import jobs
from vllm_cases import answers, engine


def main(folder: str, out: str, num_objectives: str) -> None:
    llm = engine(folder, tensor_parallel_size=2)
    found = answers(llm, jobs(int(num_objectives)))
    with open(out, "w") as file:
        json.dump([(tokens, alpha.tolist()) for tokens, alpha in found], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
