# SPDX-License-Identifier: Apache-2.0
"""Train a reward head on preference pairs from a JSON-lines file, and save the heads.

    python examples/train_on_jsonl.py --data pairs.jsonl --output heads

Each line of the file is one pair: {"prompt": ..., "chosen": ..., "rejected": ...}. Without --data a
few built-in pairs are written to a file first, so that the script runs as it is.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

import dualhead_ext as dh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="JSON lines (default: 24 built-in pairs)")
    parser.add_argument("--backbone", default="embedded", help="a folder, a hub name, or built in")
    parser.add_argument("--output", type=Path, default=Path("heads"))
    arguments = parser.parse_args()

    data = arguments.data
    if data is None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        data = arguments.output / "pairs.jsonl"
        rows = dh.data.load_preference_data("embedded")[:24]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows = dh.data.load_preference_data(data)
    print(rows.report)
    held_out = max(1, len(rows) // 8)

    path = dh.backbone_path(arguments.backbone)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = dh.DualHeadForCausalLM.from_backbone(path)
    trainer = dh.DualHeadTrainer(
        model,
        dh.DualHeadTrainingArguments(
            output_dir=str(arguments.output),
            num_train_epochs=2,
            max_length=96,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_rewards/accuracies"]
    trainer.train()
    after = trainer.evaluate()["eval_rewards/accuracies"]
    print(f"accuracy on {held_out} held-out pairs: {before:.2f} before, {after:.2f} after")

    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"heads saved in {arguments.output}")


if __name__ == "__main__":
    main()
