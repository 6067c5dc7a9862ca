# SPDX-License-Identifier: Apache-2.0
"""Trains the small backbone that comes with the package, tokenizer included, and writes
dualhead_ext/data/backbone.

DUALHEAD_DATA=<folder> python scripts/train_backbone.py

The folder holds hh-rlhf-text/dialogues.jsonl.gz (key ``text``). A BPE of 4,096 entries and a Llama
of 4.3M parameters, on 0.9M tokens, a few epochs: as coherent as so little text makes it. One
dialogue in twenty, chosen by a hash of its first human turn so that near-copies stay together, is
held out; the state with the lowest loss on it is kept. The work is in
dualhead_ext/eval/paper/pretraining.py.
"""

import argparse
import json
import os
from pathlib import Path

from dualhead_ext.data import read_jsonl
from dualhead_ext.eval.paper.pretraining import (
    is_held_out,
    pretrain,
    train_tokenizer,
    write_backbone,
)
from dualhead_ext.eval.paper.settings import BackboneSpec

OUTPUT = Path(__file__).resolve().parents[1] / "dualhead_ext" / "data" / "backbone"


def main() -> None:
    default = BackboneSpec()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=default.batch_size,
        help=f"rows of {default.context} tokens",
    )
    parser.add_argument("--lr", type=float, default=default.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = Path(os.environ["DUALHEAD_DATA"]) / "hh-rlhf-text" / "dialogues.jsonl.gz"
    dialogues = [row["text"] for _, row in read_jsonl(path)]
    tokenizer = train_tokenizer([text for text in dialogues if not is_held_out(text)])
    spec = BackboneSpec(epochs=args.epochs, batch_size=args.batch_size, learning_rate=args.lr)
    model, record = pretrain(
        spec, dialogues, tokenizer, seed=args.seed, progress=True, compiled=True
    )
    write_backbone(model, tokenizer, record, args.output)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
