# SPDX-License-Identifier: Apache-2.0
"""Training on ranked samples. The gated head is trained by its own trainer; the other systems by
:mod:`dualhead_ext.eval.paper.training`, on the best and the worst response of each list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import PrinterCallback

from ...config import DualHeadConfig
from ...data import score_pairs
from ...head.dual_head import DualHead
from ...model.causal_lm import DualHeadForCausalLM
from ...model.head_files import check_head_state
from ...model.head_folder import read_head_folder
from ...train.presets import head_of
from ...train.trainer import DualHeadTrainer, DualHeadTrainingArguments
from ..paper.settings import TrainSettings
from ..paper.trained import load_policy, load_reward_model, read_record
from ..paper.training import TRAINERS
from ..paper.training_run import load_tokenizer
from ..scorers import Scorer, scorer
from .attributes import ATTRIBUTES

Row = dict[str, Any]
# Settings of the adapters and the reward model, chosen once by the loss on the backbone's pairs.
ADAPTER = TrainSettings(
    learning_rate=3e-4, epochs=1.0, batch_size=16, micro_batch_size=8, lora=True, warmup=0.1
)


def ranked_rows(samples: Sequence[Row], attributes: Sequence[str]) -> list[Row]:
    """Rows to train on: the same samples ranked for each attribute, whose index is the objective.

    Args:
        samples: rows ``{"prompt": question, "responses": texts, "ended": booleans}``.
    """
    return [
        _ranked(row, scorer(ATTRIBUTES[name].gold), objective)
        for objective, name in enumerate(attributes)
        for row in samples
        if _usable(row, scorer(ATTRIBUTES[name].gold))
    ]


def _kept(row: Row) -> list[int]:
    return [i for i, text in enumerate(row["responses"]) if text]


def _usable(row: Row, judge: Scorer) -> bool:
    texts = [row["responses"][i] for i in _kept(row)]
    return len(texts) > 1 and bool(score_pairs(judge.rewards(row["prompt"], texts)))


def _ranked(row: Row, judge: Scorer, objective: int) -> Row:
    kept = _kept(row)
    texts = [row["responses"][i] for i in kept]
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "responses": [[{"role": "assistant", "content": text}] for text in texts],
        "scores": judge.rewards(row["prompt"], texts),
        "ended": [row["ended"][i] for i in kept],
        "objective": objective,
    }


def pairs_of(rows: Sequence[Row]) -> list[Row]:
    """The best and the worst response of each list, as a pair."""
    found = []
    for row in rows:
        order = sorted(range(len(row["scores"])), key=row["scores"].__getitem__)
        found.append(
            {
                "prompt": row["prompt"],
                "chosen": row["responses"][order[-1]],
                "rejected": row["responses"][order[0]],
            }
        )
    return found


# --- methods --------------------------------------------------------------------------------------


def train_gated_head(
    backbone: str,
    rows: list[Row],
    held_out: list[Row],
    out: Path,
    cell: dict[str, Any],
    hidden: Path,
) -> dict[str, Any]:
    """Train a gated head by :class:`dualhead_ext.DualHeadTrainer`, with a preset and the cell's own
    options.
    """
    preset = cell["options"].get("preset", "default")
    options = {n: v for n, v in cell["options"].items() if n != "preset"}
    names = {field.name for field in fields(DualHeadConfig)}
    head = head_of(preset, {n: v for n, v in options.items() if n in names})
    training = {n: v for n, v in options.items() if n not in names} | cell["training"]
    torch.manual_seed(cell["seed"])
    model = DualHeadForCausalLM.from_backbone(
        backbone, dtype=torch.float32, num_objectives=len(cell["attributes"]), **head
    )
    arguments = DualHeadTrainingArguments(
        output_dir=str(out / "trainer"),
        preset=preset,
        seed=cell["seed"],
        max_length=cell["max_length"],
        cache_hidden=str(hidden),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **training,
    )
    trainer = DualHeadTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=load_tokenizer(Path(backbone)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.cache_hidden()
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    found = trainer.evaluate()
    model.save_pretrained(out)
    module = model.lm_head_module
    parts = (module.reward_head, module.gate)
    return {
        "train_seconds": round(seconds, 2),
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "held_out_accuracy": found.get("eval_rewards/accuracies"),
        "alpha": found.get("eval_gate/mean"),
    }


def train_other(
    method: str, backbone: str, rows: list[Row], out: Path, cell: dict[str, Any]
) -> dict[str, Any]:
    """Train an adapter by a method of `TRAINERS`, on pairs."""
    from dataclasses import replace

    settings = replace(
        ADAPTER, seed=cell["seed"], max_length=cell["max_length"], **cell["training"]
    )
    started = time.monotonic()
    TRAINERS[method](Path(backbone), pairs_of(rows), out, settings)
    record = read_record(out)
    return {
        "train_seconds": round(time.monotonic() - started, 2),
        "parameters": record["trained_parameters"],
        "held_out_accuracy": None,
        "alpha": None,
    }


# --- what training wrote --------------------------------------------------------------------------


def load_head(folder: Path, lm_head: nn.Linear) -> tuple[DualHead, list[list[float]] | None]:
    """A trained gated head that shares a plain LM head, and its curve of (strength, KL)."""
    stored, state = read_head_folder(folder)
    config = stored["dual_head"]
    settings = config.to_dict()
    head = DualHead.from_lm_head(lm_head, **settings)
    check_head_state(config, state, None, str(folder))
    head.load_state_dict(state, strict=False)  # all but the LM head, which is shared
    return head.eval().requires_grad_(False), settings.get("kl_curve")


def load_guide(method: str, folder: Path, backbone: str) -> nn.Module:
    """An adapter on its own copy of the backbone, or a reward model."""
    load: Callable[..., nn.Module] = load_policy
    if method == "reward_model":
        return load_reward_model(folder, Path(backbone)).requires_grad_(False)
    return load(folder, Path(backbone), merge=False).requires_grad_(False)
