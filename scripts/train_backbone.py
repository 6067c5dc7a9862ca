# SPDX-License-Identifier: Apache-2.0
"""Trains the small backbone that comes with the package, tokenizer included, and writes
dualhead_ext/backbone.

DUALHEAD_DATA=<folder> python scripts/train_backbone.py

The folder holds hh-rlhf-text/dialogues.jsonl.gz (key ``text``). A BPE of 4,096 entries and a Llama
of 4.3M parameters, on 0.9M tokens, a few epochs: as coherent as so little text makes it. One
dialogue in twenty, chosen by a hash of its first human turn so that near-copies stay together, is
held out; the state with the lowest loss on it is kept.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import platform
import random
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUTPUT = Path(__file__).resolve().parents[1] / "dualhead_ext" / "backbone"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTEXT = 512


def read_dialogues(folder: Path) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)."""
    with gzip.open(folder / "hh-rlhf-text" / "dialogues.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    held_out = [text for text in texts if is_held_out(text)]
    return [text for text in texts if not is_held_out(text)], held_out


def is_held_out(text: str) -> bool:
    first_turn = text.split("\n\nAssistant:")[0]
    return int(hashlib.sha256(first_turn.encode()).hexdigest(), 16) % 20 == 0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text comes back exactly. Adds BOS; EOS is left to whoever ends a
    dialogue.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pack(dialogues: list[list[int]], rng: random.Random) -> torch.Tensor:
    """Shuffled dialogues in one row after another, cut into rows of CONTEXT + 1 at a random offset:
    (N, CONTEXT + 1).
    """
    order = dialogues[:]
    rng.shuffle(order)
    flat = [token for dialogue in order for token in dialogue][rng.randrange(CONTEXT) :]
    rows = len(flat) // (CONTEXT + 1)
    return torch.tensor(flat[: rows * (CONTEXT + 1)]).view(rows, CONTEXT + 1)


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Nats per token."""
    model.eval()
    total = sum(loss_of(model, part, "sum").item() for part in rows.split(8))
    model.train()
    return total / rows[:, 1:].numel()


def optimizer_of(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """100 steps of warm-up, then half a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, step / 100) * (0.05 + 0.95 * cosine)


def train(model, train_rows, validation, steps: int, args: argparse.Namespace, save) -> float:
    """Train for ``steps``, calling ``save()`` whenever the validation loss is the lowest so far;
    returns it.
    """
    rng, optimizer = random.Random(args.seed), optimizer_of(model, args.lr)
    compiled = torch.compile(loss_of)
    best, batches = math.inf, iter(())
    progress = tqdm(range(1, steps + 1), desc="backbone")
    for step in progress:
        rows = next(batches, None)
        if rows is None or len(rows) < args.batch_size:
            batches = iter(pack(train_rows, rng).split(args.batch_size))
            rows = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, args.lr)
        loss = compiled(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps:
            now = validation_loss(model, validation)
            if now < best:
                best = now
                save()
        progress.set_postfix(loss=f"{loss.item():.3f}", best=f"{best:.4f}")
    return best


def write(model, tokenizer, folder: Path) -> None:
    """The package's files: bf16 weights, tokenizer, configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(model.parameters()).dtype
    model.bfloat16().save_pretrained(folder)
    model.to(dtype)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    started = time.time()
    texts, held_out = read_dialogues(Path(os.environ["DUALHEAD_DATA"]))
    tokenizer = train_tokenizer(texts)
    train_rows, held_rows = (
        [[*ids, tokenizer.eos_token_id] for ids in tokenizer(part)["input_ids"]]
        for part in (texts, held_out)
    )
    validation = pack(held_rows, random.Random(1))
    model = make_model(tokenizer)
    tokens = sum(map(len, train_rows))
    steps = args.epochs * (tokens // (CONTEXT * args.batch_size))
    kept: dict[str, torch.Tensor] = {}

    def save() -> None:
        kept.update({name: value.clone() for name, value in model.state_dict().items()})

    best = train(model, train_rows, validation, steps, args, save)
    model.load_state_dict(kept)
    write(model, tokenizer, args.output)
    held_bytes = sum(len(text.encode()) for text in held_out)
    record = {
        "validation_loss_nats_per_token": round(best, 4),
        "validation_bits_per_byte": round(
            best / math.log(2) * sum(map(len, held_rows)) / held_bytes, 4
        ),
        "train_dialogues": len(texts),
        "train_tokens": tokens,
        "held_out_dialogues": len(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "epochs": args.epochs,
        "seconds": round(time.time() - started),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    (args.output / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
