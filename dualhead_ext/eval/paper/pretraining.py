# SPDX-License-Identifier: Apache-2.0
"""Pre-training of small backbones: a byte-level BPE, packed rows, AdamW, 5 % of the text held out.

The built-in backbone is made by the same code (scripts/train_backbone.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ...data import ASSISTANT
from .settings import BackboneSpec
from .trained import bars, new_folder

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_WARMUP, _VALIDATE_EVERY = 100, 200


def is_held_out(text: str) -> bool:
    """True for one dialogue in twenty, by a hash of its first human turn, so that near-duplicates
    are on the same side.
    """
    first_turn = text.split(ASSISTANT)[0]
    return int(hashlib.sha256(first_turn.encode()).hexdigest(), 16) % 20 == 0


def train_tokenizer(texts: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which reproduces any text exactly. It adds BOS, but no EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
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


def make_model(spec: BackboneSpec, tokenizer: Any) -> PreTrainedModel:
    """The backbone of a spec with fresh weights, embeddings tied."""
    sliding = {"sliding_window": None} if spec.architecture == "mistral" else {}
    config = AutoConfig.for_model(
        spec.architecture,
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.key_value_heads,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sliding,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pack(dialogues: list[list[int]], rng: random.Random, context: int) -> torch.Tensor:
    """Shuffle and concatenate the dialogues and cut them, from a random offset, into rows
    (N, context + 1).
    """
    order = dialogues[:]
    rng.shuffle(order)
    flat = [token for dialogue in order for token in dialogue][rng.randrange(context) :]
    rows = len(flat) // (context + 1)
    return torch.tensor(flat[: rows * (context + 1)]).view(rows, context + 1)


def loss_of(
    model: PreTrainedModel, rows: torch.Tensor, bf16: bool = True, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of each row's next tokens, in nats."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def validation_loss(model: PreTrainedModel, rows: torch.Tensor, bf16: bool = True) -> float:
    """Validation loss in nats per token."""
    model.eval()
    total = sum(loss_of(model, part, bf16, "sum").item() for part in rows.split(8))
    model.train()
    return total / rows[:, 1:].numel()


def _optimizer_of(model: PreTrainedModel, learning_rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    warmup = min(_WARMUP, max(1, steps // 10))
    return peak * min(1.0, step / warmup) * (0.05 + 0.95 * cosine)


def _train(
    model: PreTrainedModel,
    batches: Callable[[], torch.Tensor],
    validation: torch.Tensor,
    steps: int,
    spec: BackboneSpec,
    progress: bool,
    compiled: bool,
) -> float:
    """Train for ``steps``; leaves the model at its lowest validation loss and returns that."""
    optimizer = _optimizer_of(model, spec.learning_rate)
    compute_loss = torch.compile(loss_of) if compiled else loss_of
    best, kept = math.inf, {}
    bar = tqdm(range(1, steps + 1), desc="backbone", disable=not progress)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step - 1, steps, spec.learning_rate)
        loss = compute_loss(model, batches(), spec.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(now := loss.item()):
            raise FloatingPointError(f"pretrain_backbone: the loss of step {step} is {now}")
        if step % _VALIDATE_EVERY == 0 or step == steps:
            held_out = validation_loss(model, validation, spec.bf16)
            if held_out < best:
                best = held_out
                kept = {name: value.clone() for name, value in model.state_dict().items()}
        bar.set_postfix(loss=f"{now:.3f}", best=f"{best:.4f}")
    if not kept:
        raise FloatingPointError(f"pretrain_backbone: the validation loss is {held_out}")
    model.load_state_dict(kept)
    return best


def pretrain(
    spec: BackboneSpec,
    dialogues: list[str],
    tokenizer: Any,
    seed: int = 0,
    progress: bool = False,
    compiled: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A backbone from scratch: (the model at its lowest validation loss, fp32; figures of the run).

    Args:
        spec: sizes and schedule.
        dialogues: texts; those with :func:`is_held_out` are for validation, the others for
            training.
        tokenizer: must add no EOS; each dialogue gets one here.
        compiled: whether to use torch.compile.
    Raises:
        ValueError: too little text for a row on either side. FloatingPointError: a loss that is
            not finite.
    """
    torch.manual_seed(seed)
    started, rng = time.monotonic(), random.Random(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = ([t for t in dialogues if not is_held_out(t)], [t for t in dialogues if is_held_out(t)])
    train_ids, held_ids = (
        [[*ids, tokenizer.eos_token_id] for ids in (tokenizer(texts)["input_ids"] if texts else [])]
        for texts in sides
    )
    tokens = sum(map(len, train_ids))
    if min(tokens, sum(map(len, held_ids))) < 2 * spec.context + 1:
        raise ValueError(
            f"pretrain_backbone: dialogues must give rows of {spec.context} tokens to train on and "
            f"to hold out, got {tokens} and {sum(map(len, held_ids))} tokens"
        )
    validation = pack(held_ids, random.Random(1), spec.context).to(device)
    model = make_model(spec, tokenizer).to(device).train()
    steps = spec.max_steps or spec.epochs * max(1, tokens // (spec.context * spec.batch_size))

    def endless() -> Any:
        while True:
            parts = pack(train_ids, rng, spec.context).split(spec.batch_size)
            whole = [part for part in parts if len(part) == spec.batch_size]
            yield from (part.to(device) for part in whole or parts)

    batches = endless()
    best = _train(model, lambda: next(batches), validation, steps, spec, progress, compiled)
    held_bytes = sum(len(text.encode()) for text in sides[1])
    bits = best / math.log(2) * sum(map(len, held_ids)) / held_bytes
    return model.eval(), {
        "validation_loss_nats_per_token": round(best, 4),
        "validation_bits_per_byte": round(bits, 4),
        "train_dialogues": len(train_ids),
        "train_tokens": tokens,
        "held_out_dialogues": len(held_ids),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "spec": spec.to_dict(),
        "seed": seed,
        "seconds": round(time.monotonic() - started),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def write_backbone(
    model: PreTrainedModel, tokenizer: Any, record: dict[str, Any], folder: Path
) -> None:
    """Write bf16 weights, configuration, tokenizer and ``recipe.json``, the run's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.bfloat16().save_pretrained(folder)
    model.to(dtype)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def pretrain_backbone(
    spec: BackboneSpec,
    dialogues: list[str],
    tokenizer_dir: Path,
    out: Path,
    seed: int = 0,
    progress: bool = False,
    compiled: bool = False,
) -> Path:
    """Run :func:`pretrain` with a folder's tokenizer, so that backbones share it, and write the
    backbone to ``out``.

    Raises:
        FileExistsError: ``out`` is there and not empty. As :func:`pretrain`.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    with new_folder(out) as folder, bars(progress):
        model, record = pretrain(spec, dialogues, tokenizer, seed, progress, compiled)
        write_backbone(model, tokenizer, record, folder)
    return Path(out)
