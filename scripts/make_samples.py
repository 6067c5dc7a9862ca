# SPDX-License-Identifier: Apache-2.0
"""Cuts the sample in dualhead_ext/data/samples out of HH-RLHF: the harmless-base pairs, which are
MIT-licensed.

DUALHEAD_DATA=<folder> python scripts/make_samples.py

The folder holds hh-rlhf/train.jsonl.gz and hh-rlhf/test.jsonl.gz with the keys chosen, rejected,
subset, id. Byte for byte repeatable: the compressed files carry no name and no time.
"""

import gzip
import io
import json
import os
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[1] / "dualhead_ext" / "data" / "samples"


def main() -> None:
    source = Path(os.environ["DUALHEAD_DATA"]) / "hh-rlhf"
    SAMPLES.mkdir(exist_ok=True)
    for split in ("train", "test"):
        with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if row["subset"] == "harmless-base"]
        lines = (
            json.dumps({k: row[k] for k in ("chosen", "rejected", "id")}, ensure_ascii=False)
            for row in rows
        )
        buffer = io.BytesIO()
        with gzip.GzipFile(
            filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9
        ) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        (SAMPLES / f"harmless-base-{split}.jsonl.gz").write_bytes(buffer.getvalue())
        print(f"{split}: {len(rows)} pairs, {len(buffer.getvalue())} bytes")


if __name__ == "__main__":
    main()
