# SPDX-License-Identifier: Apache-2.0
"""``make demo``: train a reward head and a gate on real preference pairs, measure, decode.

Also the shortest whole example of the library; everything it takes from here is public.
"""

from __future__ import annotations

import shlex
import time
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

import dualhead_ext as dh
from dualhead_ext import show
from dualhead_ext.eval.metrics import longer_is_better
from dualhead_ext.progress import ProgressBars, held_out_accuracy

# Of the test split, so nobody has seen them; most others there are worse.
QUESTIONS = (
    "How do jellyfish mate",
    "How can I rob a casino",
    "My best friend isn't talking to me and I don't know why",
)

# For 4.3M parameters and a thousand pairs; the defaults are the paper's, for 7B and many more.
TRAINING = {
    "preset": "paper",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0.1,
    "lm_reduction": "mean",
    "max_length": 256,
    "logging_steps": 2,
    "save_strategy": "no",
}


def run(
    output: str,
    train_pairs: int,
    test_pairs: int,
    epochs: float,
    new_tokens: int,
    seed: int,
    color: str = "auto",
) -> None:
    """The whole job; prints what it finds, whatever that is.

    Args:
        output: folder for the heads.
        train_pairs, test_pairs: how many pairs of the embedded sample to use.
        epochs: times through the training pairs.
        new_tokens: tokens to decode for each prompt and decoder.
        seed: of the gate's first weights and the order of the pairs.
        color: "auto", "always" or "never".
    """
    started = time.monotonic()
    to = show.console(color)
    set_seed(seed)
    path = str(dh.data.embedded_backbone_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = dh.DualHeadForCausalLM.from_backbone(path, dtype=torch.float32)
    train = dh.data.load_preference_data("embedded")[:train_pairs]
    test = dh.data.load_preference_data("embedded", "test")[:test_pairs]
    _describe(model, len(train), len(test))

    arguments = dh.DualHeadTrainingArguments(
        output_dir=output,
        num_train_epochs=epochs,
        seed=seed,
        use_cpu=True,
        report_to="none",
        **TRAINING,
    )
    trainer = dh.DualHeadTrainer(
        model, arguments, train_dataset=train, eval_dataset=test, processing_class=tokenizer
    )
    ProgressBars.put_on(trainer)
    before = held_out_accuracy(trainer)
    trainer.train()
    after = held_out_accuracy(trainer)
    longer, _ = longer_is_better(test)
    print("\nHow often the reward head gives the chosen response the higher probability")
    print(f"(sum of log-probabilities, {len(test)} unseen pairs):")
    print(f"  before training         {before}")
    print(f"  after training          {after}")
    print(f"  always the longer one   {show.percent(longer)}")

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print("\nUnseen prompts, greedy; the backbone has only 4.3M parameters.")
    show.print_legend(to)
    for question in QUESTIONS:
        compare(model, tokenizer, question, new_tokens, to)
    folder = shlex.quote(output)
    print(f"\nHeads in {folder}; {time.monotonic() - started:.0f} s in all. To go on:")
    print(f'  dualhead generate {folder} "How do I make a friend?" --show-gate --strength 1.5')
    print("  dualhead train --help")


def _describe(model: Any, train_pairs: int, test_pairs: int) -> None:
    head = model.lm_head_module
    trained = {
        name: sum(p.numel() for p in module.parameters()) / 1e6
        for name, module in (("reward head", head.reward_head), ("gate", head.gate))
    }
    total = sum(p.numel() for n, p in model.named_parameters() if ".reward_head." not in n)
    print("Human preference pairs (HH-RLHF, harmless-base): ", end="")
    print(f"{train_pairs} to train on, {test_pairs} unseen ones to measure on.")
    print(f"Backbone: {total / 1e6 - trained['gate']:.1f}M parameters, frozen. Trained: ", end="")
    print(" and ".join(f"a {name} of {count:.1f}M" for name, count in trained.items()) + ".\n")


def compare(model: Any, tokenizer: Any, question: str, new_tokens: int, to: Any) -> None:
    """Print what the backbone alone says to a question, what the gated head does, and what the
    reward head alone would: the gate lets little of it through where the text is what counts.
    """
    prompt = f"\n\nHuman: {question}?\n\nAssistant:"
    inputs = tokenizer(prompt, return_tensors="pt")
    decoders = {"backbone": {"strength": 0.0}, "gated": {}, "reward": {"alpha": 1.0}}
    for name, control in decoders.items():
        out = model.generate(
            **inputs,
            **control,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_gate=True,
        )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = show.TokenText(tokenizer)
        alphas = out.gate_alpha[0].tolist() if name != "backbone" else [None] * len(tokens)
        to.out(f"{name:>9}: ", end="")
        show.print_tokens(to, zip(map(text.push, tokens), alphas, strict=True))
