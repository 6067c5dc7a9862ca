# SPDX-License-Identifier: Apache-2.0
"""Runnable systems: the models of trained cells, their decoder, and the distribution it samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.attachment import detach
from ...model.causal_lm import DualHeadForCausalLM
from ...model.weak_to_strong import WeakToStrong
from .. import decoding
from ..likelihood import Distribution, of_genarm, of_model
from .trained import load_policy, load_reward_model
from .training_run import load_tokenizer


@dataclass(frozen=True)
class Running:
    """A system that is loaded and ready to decode.

    Attributes:
        decode: (inputs, options of ``generate()``) -> (B, T + new) ids.
        models: every model that it calls.
        distribution: the distribution that it samples from; None if a step depends on more than
            the text so far.
        temperature: factor of the sampling temperature, included in ``distribution``.
    """

    decode: Callable[..., Tensor]
    models: tuple[nn.Module, ...]
    distribution: Distribution | None
    tokenizer: Any
    temperature: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.models[0].device


def device() -> torch.device:
    """The device that all systems run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


Folders = Mapping[str, Path]


def open_system(decoder: str, folders: Folders, options: Mapping[str, Any], dtype: str) -> Running:
    """Load a system.

    Args:
        decoder: a name from DECODERS.
        folders: role -> folder: ``backbone``, ``policy`` (the model that decodes; may be the
            backbone), ``guide0``, ``guide1``, ..., and ``<role>_backbone`` for a model trained on
            another backbone.
        options: options of the decoder.
        dtype: dtype of all weights.
    """
    return DECODERS[decoder](_Loader(folders, getattr(torch, dtype)), **options)


class _Loader:
    def __init__(self, folders: Folders, dtype: torch.dtype) -> None:
        self._folders, self._dtype = folders, dtype
        self.tokenizer = load_tokenizer(folders["backbone"])

    def _load(self, load: Callable[..., nn.Module], role: str) -> nn.Module:
        base = self._folders.get(f"{role}_backbone", self._folders["backbone"])
        model = load(self._folders[role], base, dtype=self._dtype)
        return model.requires_grad_(False).to(device())

    def policy(self, role: str = "policy") -> nn.Module:
        return self._load(load_policy, role)

    def reward_model(self, role: str = "guide0") -> nn.Module:
        return self._load(load_reward_model, role)

    def guides(self) -> list[nn.Module]:
        roles = sorted(r for r in self._folders if r.startswith("guide") and "_" not in r)
        return [self.policy(role) for role in roles]


def _plain(load: _Loader, **controls: Any) -> Running:
    """A model's own generate(), with the controls of a gated head."""
    model = load.policy()
    if "objective_weights" in controls:
        controls["objective_weights"] = torch.tensor(controls["objective_weights"])
    decode = partial(_generate, model, controls)
    return Running(decode, (model,), of_model(model, **controls), load.tokenizer)


def _generate(
    model: nn.Module, controls: dict[str, Any], inputs: dict[str, Tensor], **options: Any
) -> Tensor:
    return decoding.plain(model, inputs, **controls, **options)


def _merged(load: _Loader) -> Running:
    """Both heads of a fixed gate merged into one plain lm_head."""
    gated: DualHeadForCausalLM = load.policy()
    linear = gated.lm_head_module.merge_fixed()
    model = detach(gated)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(linear.requires_grad_(False))
    return Running(partial(_generate, model, {}), (model,), of_model(model), load.tokenizer)


def _genarm(load: _Loader, strengths: list[float], temperature: float) -> Running:
    model, guides = load.policy(), load.guides()

    def decode(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        return decoding.genarm(model, inputs, reward_models=guides, strengths=strengths, **options)

    return Running(
        decode,
        (model, *guides),
        of_genarm(model, guides, strengths, temperature),
        load.tokenizer,
        temperature,
    )


def _args(load: _Loader, weight: float, k: int, greedy: bool) -> Running:
    model, judge = load.policy(), load.reward_model()

    def decode(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        if greedy:
            options |= {"do_sample": False, "temperature": None}
        return decoding.args(model, inputs, reward_model=judge, weight=weight, k=k, **options)

    return Running(decode, (model, judge), None, load.tokenizer)


def _best_of_n(load: _Loader, n: int) -> Running:
    model, judge = load.policy(), load.reward_model()

    def decode(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        reward = partial(decoding.sequence_rewards, judge)
        return decoding.best_of_n(model, inputs, reward=reward, n=n, **options)

    return Running(decode, (model, judge), None, load.tokenizer)


def _weak_to_strong(load: _Loader) -> Running:
    """The gated head of ``guide0`` on its own small backbone guides the policy."""
    strong, weak = load.policy(), load.policy("guide0")
    both = WeakToStrong(strong, weak, load.tokenizer, load.tokenizer)

    def decode(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        return both.generate(**inputs, **options)

    return Running(decode, (strong, weak), of_model(both), load.tokenizer)


# name: (loader, options) -> Running
DECODERS: dict[str, Callable[..., Running]] = {
    "plain": _plain,
    "merged": _merged,
    "genarm": _genarm,
    "args": _args,
    "best_of_n": _best_of_n,
    "weak_to_strong": _weak_to_strong,
}
