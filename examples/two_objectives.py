# SPDX-License-Identifier: Apache-2.0
"""Train two reward heads, and trade them off while decoding.

    python examples/two_objectives.py --output two-heads

Objective 0 prefers short answers, objective 1 answers with exclamation marks. Each pair names its
objective. Each call of `generate()` weights the two heads with its own `objective_weights`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

import dualhead_ext as dh

SHORT, LIVELY = 0, 1
WEIGHTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))


def pairs() -> list[dict]:
    """Pairs of the same prompts for both objectives."""
    rows = []
    for topic in ("bread", "rain", "chess", "tea", "trains", "birds", "snow", "music"):
        prompt = f"\n\nHuman: Tell me about {topic}.\n\nAssistant:"
        short, long = f" I like {topic}.", f" I like {topic}, and I think that you may like it too."
        rows.append({"prompt": prompt, "chosen": short, "rejected": long, "objective": SHORT})
        calm, lively = f" I know {topic}.", f" I love {topic}! It is great!"
        rows.append({"prompt": prompt, "chosen": lively, "rejected": calm, "objective": LIVELY})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("two-heads"))
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    path = dh.backbone_path("embedded")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = dh.DualHeadForCausalLM.from_backbone(path, num_objectives=2)
    options = dh.DualHeadTrainingArguments(
        output_dir=str(arguments.output), num_train_epochs=8, save_strategy="no", report_to="none"
    )
    trainer = dh.DualHeadTrainer(model, options, train_dataset=pairs(), processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(arguments.output)

    prompt = tokenizer("\n\nHuman: Tell me about cakes.\n\nAssistant:", return_tensors="pt")
    inputs = {name: value.repeat(len(WEIGHTS), 1) for name, value in prompt.items()}
    tokens = model.generate(
        **inputs,
        objective_weights=torch.tensor(WEIGHTS),  # (B, K): one row per request
        strength=3.0,
        max_new_tokens=arguments.max_new_tokens,
    )
    new = tokens[:, prompt["input_ids"].shape[1] :]
    for weights, text in zip(WEIGHTS, tokenizer.batch_decode(new, True), strict=True):
        print(f"short {weights[SHORT]:g}, lively {weights[LIVELY]:g}: {text.strip()!r}")


if __name__ == "__main__":
    main()
