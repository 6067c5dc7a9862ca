# SPDX-License-Identifier: Apache-2.0
"""Decode one batch in which each request has its own strength.

    python examples/strength_per_request.py heads

heads is a folder that `dualhead train` or examples/train_on_jsonl.py has written. Strength 0 gives
the backbone's own text. A request's text does not depend on the rest of the batch.
"""

import argparse

import torch
from transformers import AutoTokenizer

import dualhead_ext as dh

STRENGTHS = (0.0, 0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads")
    parser.add_argument("--question", default="How do I bake bread?")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    model = dh.DualHeadForCausalLM.from_pretrained(arguments.heads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.heads, padding_side="left")
    prompt = f"\n\nHuman: {arguments.question}\n\nAssistant:"
    inputs = tokenizer([prompt] * len(STRENGTHS), return_tensors="pt")
    out = model.generate(
        **inputs,
        strength=torch.tensor(STRENGTHS),
        max_new_tokens=arguments.max_new_tokens,
        return_dict_in_generate=True,
        output_gate=True,
    )
    texts = tokenizer.batch_decode(
        out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for strength, alpha, text in zip(STRENGTHS, out.gate_alpha, texts, strict=True):
        print(f"strength {strength:g}, mean alpha {alpha.mean():.2f}: {text.strip()!r}")


if __name__ == "__main__":
    main()
