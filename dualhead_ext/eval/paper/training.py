# SPDX-License-Identifier: Apache-2.0
"""Training of every system that is compared: one function each, all with the same signature. They
take a backbone's folder, preference pairs and settings, and write a folder that :mod:`.trained`
loads.

They use `DualHeadTrainer`, and TRL's trainers with PEFT's adapters, all on the same tokens and
response masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ...config import DualHeadConfig
from ...data.collate import tokenize_pairs
from ...model.causal_lm import DualHeadForCausalLM
from ...train.presets import head_of
from ...train.trainer import DualHeadTrainer, DualHeadTrainingArguments
from .reinforcement import train_rloo
from .settings import TrainSettings
from .trained import fresh_reward_model, load_policy
from .training_run import Pairs, adapter, load_tokenizer, run


def train_dual_head(
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    *,
    progress: bool = False,
    **options: Any,
) -> Path:
    """Train a gated head on a frozen backbone with :class:`dualhead_ext.DualHeadTrainer`.

    Args:
        backbone: the backbone's folder.
        pairs: rows of :func:`dualhead_ext.data.load_preference_data`; with K > 1 each may have an
            ``objective``.
        out: the folder to write; must be new or empty.
        settings: beta is beta_r unless ``options`` set it. Weights are trained in fp32.
        progress: show a progress bar.
        options: fields of DualHeadConfig (gate, gate_num_heads, mix, num_objectives, ...) and of
            DualHeadTrainingArguments (lambda_g, gate_regularizer, pref_on, lm_reduction, ...);
            preset is "paper" unless it names another.
    Returns:
        ``out``.
    Raises:
        FloatingPointError: a loss, gradient norm or weight is not finite.
        FileExistsError: ``out`` is not empty.
        TypeError: an unknown option.
    """
    names = {field.name for field in fields(DualHeadConfig)}
    beta_r = options.get("beta_r", settings.beta_of("dual_head"))
    preset = options.get("preset", "paper")
    head = head_of(preset, {name: value for name, value in options.items() if name in names})
    loss = {name: value for name, value in options.items() if name not in names}
    tokenizer = load_tokenizer(backbone)

    def build(arguments: dict[str, Any]) -> Any:
        model = DualHeadForCausalLM.from_backbone(str(backbone), dtype=torch.float32, **head)
        return DualHeadTrainer(
            model,
            DualHeadTrainingArguments(**arguments | loss | {"preset": preset, "beta_r": beta_r}),
            train_dataset=tokenize_pairs(pairs, tokenizer, settings.max_length),
            processing_class=tokenizer,
        )

    return run("dual_head", build, backbone, pairs, out, settings, progress, options)


def train_autoregressive_reward(
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    *,
    progress: bool = False,
    **options: Any,
) -> Path:
    """GenARM's reward model: -log sigma(beta (sum log pi(chosen) - sum log pi(rejected))), no
    reference. beta default 0.05. options: of TRL's CPOConfig, such as label_smoothing. Otherwise
    as :func:`train_dual_head`; ImportError without the extras trl and peft.
    """
    options = {"loss_type": "sigmoid"} | options
    method = "autoregressive_reward"
    return _train_contrastive(method, backbone, pairs, out, settings, progress, options)


def train_simpo(
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    *,
    gamma: float = 1.0,
    progress: bool = False,
    **options: Any,
) -> Path:
    """SimPO: -log sigma(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma), no reference.
    beta default 2. options: of TRL's CPOConfig. Otherwise as :func:`train_autoregressive_reward`.
    """
    options = {"loss_type": "simpo", "simpo_gamma": gamma} | options
    return _train_contrastive("simpo", backbone, pairs, out, settings, progress, options)


def _train_contrastive(
    method: str,
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    progress: bool,
    options: dict[str, Any],
) -> Path:
    def build(arguments: dict[str, Any]) -> Any:
        from .trl_trainers import contrastive_trainer

        tokenizer = load_tokenizer(backbone)
        rows = tokenize_pairs(pairs, tokenizer, settings.max_length)
        extra = {"beta": settings.beta_of(method)} | options
        model = load_policy(backbone)
        peft = adapter(settings, "CAUSAL_LM")
        return contrastive_trainer(model, rows, tokenizer, arguments, peft, **extra)

    return run(method, build, backbone, pairs, out, settings, progress, options)


def train_dpo(
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    *,
    progress: bool = False,
    **options: Any,
) -> Path:
    """DPO: -log sigma(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)]), sums; the
    reference is the backbone. beta default 0.1. options: of TRL's DPOConfig. Otherwise as
    :func:`train_autoregressive_reward`.
    """

    def build(arguments: dict[str, Any]) -> Any:
        from .trl_trainers import dpo_trainer

        tokenizer = load_tokenizer(backbone)
        rows = tokenize_pairs(pairs, tokenizer, settings.max_length)
        reference = None if settings.lora else load_policy(backbone).requires_grad_(False)
        extra = {"beta": settings.beta_of("dpo")} | options
        model = load_policy(backbone)
        peft = adapter(settings, "CAUSAL_LM")
        return dpo_trainer(model, reference, rows, tokenizer, arguments, peft, **extra)

    return run("dpo", build, backbone, pairs, out, settings, progress, options)


def train_reward_model(
    backbone: Path,
    pairs: Pairs,
    out: Path,
    settings: TrainSettings,
    *,
    progress: bool = False,
    **options: Any,
) -> Path:
    """A Bradley-Terry reward model: -log sigma(r(chosen) - r(rejected)), a scalar at the end of the
    text, from a backbone with a fresh linear score. options: of TRL's RewardConfig, such as
    center_rewards_coefficient. Otherwise as :func:`train_autoregressive_reward`.
    """

    def build(arguments: dict[str, Any]) -> Any:
        from .trl_trainers import reward_trainer

        tokenizer = load_tokenizer(backbone)
        rows = tokenize_pairs(pairs, tokenizer, settings.max_length)
        model = fresh_reward_model(backbone)
        peft = adapter(settings, "SEQ_CLS", modules_to_save=["score"])
        return reward_trainer(model, rows, tokenizer, arguments, peft, **options)

    return run("reward_model", build, backbone, pairs, out, settings, progress, options)


# name: function; each takes backbone, pairs, out and settings, the rest by name.
TRAINERS: dict[str, Callable[..., Path]] = {
    "dual_head": train_dual_head,
    "autoregressive_reward": train_autoregressive_reward,
    "dpo": train_dpo,
    "simpo": train_simpo,
    "reward_model": train_reward_model,
    "rloo": train_rloo,
}
