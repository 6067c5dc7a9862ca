# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers on our tokens. Imported only where one of them trains: TRL is an optional extra.

Each of TRL's trainers tokenises in its constructor in its own way (token boundaries, truncation
side, role markers inside a response). So the constructor gets a single pair; the trainer then gets
the rows of :func:`dualhead_ext.data.collate.tokenize_pairs` through our collator: the same tokens
and response masks that the gated head is trained on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import datasets
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

with warnings.catch_warnings():
    # trl.experimental may change: constraints.txt pins the tested version.
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

from ...data.collate import PreferenceCollator


class _Collator:
    """Our batches under the names that a trainer of TRL expects."""

    def __init__(self, pad_token_id: int) -> None:
        self._collate = PreferenceCollator(pad_token_id)


class MaskedCollator(_Collator):
    """DPOTrainer: input_ids, attention_mask, completion_mask, each (2P, T)."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._collate(rows)
        del batch["objective"]
        return batch


class TextCollator(_Collator):
    """RewardTrainer: input_ids, attention_mask, each (2P, T)."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._collate(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


class LabelCollator(_Collator):
    """CPOTrainer: for chosen_ and rejected_, input_ids, attention_mask and labels, each (P, T);
    labels are -100 outside the response.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._collate(rows)
        named = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        }
        sides = ("chosen", "rejected")
        halves = {name: tensor.chunk(2) for name, tensor in named.items()}
        return {f"{side}_{name}": halves[name][i] for i, side in enumerate(sides) for name in named}


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def _config(config_class: type, **arguments: Any) -> Any:
    """TRL recomputes activations by default, which small models do not need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option is being renamed
        return config_class(gradient_checkpointing=False, **arguments)


def _on_pairs(
    trainer_class: type,
    config_class: type,
    collator_class: type[_Collator],
    model: nn.Module,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    arguments: dict[str, Any],
    options: dict[str, Any],
    peft_config: Any,
    **others: Any,
) -> Any:
    """A trainer of TRL with our rows. An option that repeats an argument is a TypeError."""
    shown = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with _no_bars():
        trainer = trainer_class(
            model=model,
            args=_config(config_class, **arguments, **options),
            processing_class=tokenizer,
            peft_config=peft_config,
            train_dataset=shown,
            data_collator=collator_class(tokenizer.pad_token_id),
            **others,
        )
    trainer.train_dataset = rows
    return trainer


def contrastive_trainer(
    model: nn.Module,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    arguments: dict[str, Any],
    peft_config: Any,
    **options: Any,
) -> CPOTrainer:
    """CPOTrainer without its behaviour-cloning term: -log sigma of a margin without a reference
    model. It is GenARM's loss with loss_type="sigmoid" (sums) and SimPO's with "simpo" (means).
    """
    kinds, options = (CPOTrainer, CPOConfig, LabelCollator), dict(cpo_alpha=0.0, **options)
    return _on_pairs(*kinds, model, rows, tokenizer, arguments, options, peft_config)


def dpo_trainer(
    model: nn.Module,
    reference: nn.Module | None,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    arguments: dict[str, Any],
    peft_config: Any,
    **options: Any,
) -> DPOTrainer:
    """DPOTrainer; ``reference`` is None for an adapter, which is disabled to get the reference."""
    kinds, others = (DPOTrainer, DPOConfig, MaskedCollator), {"ref_model": reference}
    return _on_pairs(*kinds, model, rows, tokenizer, arguments, options, peft_config, **others)


def reward_trainer(
    model: nn.Module,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    arguments: dict[str, Any],
    peft_config: Any,
    **options: Any,
) -> RewardTrainer:
    """RewardTrainer: -log sigma(r(chosen) - r(rejected)), r at the last token before padding."""
    kinds = (RewardTrainer, RewardConfig, TextCollator)
    return _on_pairs(*kinds, model, rows, tokenizer, arguments, options, peft_config)


def rloo_trainer(
    model: nn.Module,
    reward: Callable[..., list[float]],
    prompts: list[str],
    tokenizer: Any,
    arguments: dict[str, Any],
    peft_config: Any,
    **options: Any,
) -> RLOOTrainer:
    """RLOOTrainer on prompts; reward(prompts=..., completion_ids=..., **others) scores texts."""
    arguments = {name: value for name, value in arguments.items() if name != "max_length"}
    with _no_bars():
        return RLOOTrainer(
            model=model,
            reward_funcs=reward,
            train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in prompts]),
            args=_config(RLOOConfig, **arguments, **options),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
