# SPDX-License-Identifier: Apache-2.0
"""RLHF for comparison: a policy trained on its own samples and a reward model's scores."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...data.rendering import render_prompt
from ..decoding import sequence_rewards
from .settings import TrainSettings
from .trained import load_policy, load_reward_model, weights_digest
from .training_run import Pairs, adapter, load_tokenizer, run


def train_rloo(
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    *,
    reward_model: Path,
    reward_backbone: Path | None = None,
    generations: int = 4,
    new_tokens: int = 64,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Reinforcement learning from a reward model by RLOO: clipped policy gradient with a KL penalty
    and, as baseline, the mean reward of the prompt's other samples. It is PPO without the value
    model; TRL no longer has PPO.

    Only the pairs' prompts are used, each once, except those of more than max_length - new_tokens
    tokens. beta (default 0.05) is the penalty's coefficient; a step samples ``generations`` texts
    of ``new_tokens`` for each of ``batch_size`` prompts.

    Args:
        reward_model: a folder of :func:`.training.train_reward_model`; it scores whole texts, BOS
            and EOS included, as it was trained to.
        reward_backbone: what that was trained on; default ``backbone``.
        options: of TRL's RLOOConfig. Otherwise as :func:`.training.train_dpo`.
    Raises:
        ValueError: fewer such prompts than ``batch_size``.
    """
    tokenizer = load_tokenizer(backbone)
    prompts = list(dict.fromkeys(render_prompt(row["prompt"], tokenizer)[0] for row in pairs))
    room = settings.max_length - new_tokens
    prompts = [text for text in prompts if len(tokenizer(text)["input_ids"]) <= room]
    if len(prompts) < settings.batch_size:
        raise ValueError(
            f"train_rloo: pairs must have {settings.batch_size} prompts of at most {room} tokens, "
            f"got {len(prompts)}"
        )

    def build(arguments: dict[str, Any]) -> Any:
        from .trl_trainers import rloo_trainer

        judge = load_reward_model(reward_model, reward_backbone or backbone)
        arguments["per_device_train_batch_size"] *= generations
        extra = {"num_generations": generations, "max_completion_length": new_tokens}
        extra |= {"beta": settings.beta_of("rloo")} | options
        return rloo_trainer(
            load_policy(backbone),
            partial(text_rewards, judge, tokenizer),
            prompts,
            tokenizer,
            arguments,
            adapter(settings, "CAUSAL_LM"),
            **extra,
        )

    record = options | {"generations": generations, "new_tokens": new_tokens}
    record |= {"prompts": len(prompts), "reward_model_sha256": weights_digest(reward_model)}
    return run("rloo", build, backbone, pairs, out, settings, progress, record)


def text_rewards(
    judge: nn.Module,
    tokenizer: Any,
    *,
    prompts: list[str],
    completion_ids: list[list[int]],
    **others: Any,
) -> list[float]:
    """A reward function for TRL: a reward model's score of each prompt with its completion."""
    texts = [
        [*ids, *written]
        for ids, written in zip(tokenizer(prompts)["input_ids"], completion_ids, strict=True)
    ]
    device = next(judge.parameters()).device
    rows = [torch.tensor(text, device=device) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return sequence_rewards(judge, ids, mask).tolist()
