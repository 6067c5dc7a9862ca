# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a training run on a stream of a million rows, compared with a few rows.

``python -m tools.streaming_memory --out FILE`` writes a Parquet file of 10^6 pairs to a temporary
folder, trains on it with the datasets library's streaming, and records the peak resident memory.
The run reads every row but trains on one in 10,000, like one process of 10,000, to keep it short.
The same steps over a file of 100 rows show the memory of model and libraries. Each run has its own
process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, FEW, TRAINED, BATCH = 1_000_000, 100, 100, 8
_WORDS = "the sea is calm and a good book keeps long nights short while rain falls on old roofs"


def write_rows(path: Path, count: int) -> None:
    """Write distinct pairs of a few dozen words, 100,000 at a time."""
    import pyarrow
    from pyarrow import parquet

    words = _WORDS.split()

    def text(number: int, length: int) -> str:
        return " ".join(
            words[(number * 7 + i * 3 + number // 17) % len(words)] for i in range(length)
        )

    writer = None
    for start in range(0, count, 100_000):
        numbers = range(start, min(start + 100_000, count))
        table = pyarrow.table(
            {
                "prompt": [f"Say {n}: {text(n, 30)}" for n in numbers],
                "chosen": [f" {text(n + 1, 40)} {n}" for n in numbers],
                "rejected": [f" {text(n + 2, 40)} no" for n in numbers],
            }
        )
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=10_000)
    writer.close()


def peak_of_a_run(path: Path, shares: int) -> dict[str, float]:
    """Train on the stream in this process; returns peak resident memory in GB and the time."""
    import datasets
    from transformers import AutoTokenizer

    import dualhead_ext as dh

    model = dh.DualHeadForCausalLM.from_backbone("embedded")
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    stream = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True
    ).shuffle(seed=0, buffer_size=1000)
    with tempfile.TemporaryDirectory() as folder:
        arguments = dh.DualHeadTrainingArguments(
            folder,
            max_steps=-(-TRAINED // BATCH),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            calibrate=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = dh.DualHeadTrainer(
            model=model, args=arguments, train_dataset=stream, processing_class=tokenizer
        )
        trainer.train_dataset.shares = shares
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"peak_resident_gb": round(peak, 3), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shares", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(peak_of_a_run(options.run, options.shares)))
        return
    from dualhead_ext.measurement import machine

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in (FEW, ROWS):
            path = Path(folder) / f"{rows}.parquet"
            write_rows(path, rows)
            command = [sys.executable, "-m", "tools.streaming_memory", "--run", str(path)]
            command += ["--out", str(options.out), "--shares", str(rows // TRAINED)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[str(rows)] = json.loads(done.stdout.splitlines()[-1])
            found[str(rows)]["file_gb"] = round(path.stat().st_size / 1e9, 3)
    result = {
        **machine.describe(),
        "trained_rows": TRAINED,
        "rows_per_step": BATCH,
        "runs_by_rows_of_the_file": found,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
