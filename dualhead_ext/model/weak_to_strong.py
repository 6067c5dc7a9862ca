# SPDX-License-Identifier: Apache-2.0
"""Weak to strong: heads and gate that were trained on a small backbone guide a large frozen one
with the same tokenizer.

It runs two models with two caches in eager PyTorch. At each forward of the strong model the weak
model runs on the same tokens. The layers of its cache are also layers of the strong model's Cache,
so beam search, cropping and several turns act on both.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..head.controls import Controls
from ..head.kl_cap import capped_alpha
from ..head.mixture import mix_logits
from ..ops.logits import accumulator_dtype, postprocess
from .backbones import backbone_post_processing
from .causal_lm import DualHeadForCausalLM
from .hf_cache import GENERATION_CACHE, cache_of


class WeakToStrong(nn.Module):
    """A strong model guided by a weak one's reward head and gate:
    ``z_t = (1-a_t) z_LM,t^strong + a_t z_RM,t^weak``, a_t from the weak model's gate.

    If the weak model has ``mix="probs"``: ``(1-a_t) softmax(z_LM^strong) + a_t
    softmax(z_RM^weak)``. If its reward head is a correction, its delta, computed with the weak LM
    head, replaces ``z_RM^weak - z_LM^strong``. The strong model's f follows the logits mix; in the
    probability mix each side has its own f. Neither model is changed, and each can be used alone
    between calls, but not during one.

    Args:
        strong: a plain causal language model.
        weak: a model with a gated head over the same vocabulary.
        strong_tokenizer, weak_tokenizer: if both are given, every token must have the same id in
            both. The sizes of the vocabularies are always compared.
    Raises:
        TypeError: strong has a gated head, or weak has none. ValueError: different vocabularies, or
            different devices.
    """

    def __init__(
        self,
        strong: PreTrainedModel,
        weak: DualHeadForCausalLM,
        strong_tokenizer: Any = None,
        weak_tokenizer: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(strong, DualHeadForCausalLM) or not isinstance(strong, PreTrainedModel):
            raise TypeError(
                f"WeakToStrong: strong must be a plain model (dualhead_ext.detach gives one), got "
                f"{type(strong).__name__}"
            )
        if not isinstance(weak, DualHeadForCausalLM):
            raise TypeError(f"WeakToStrong: weak must have a gated head, got {type(weak).__name__}")
        _check_vocabularies(strong, weak, strong_tokenizer, weak_tokenizer)
        if strong.device != weak.device:
            raise ValueError(
                f"WeakToStrong: weak must be on {strong.device}, as strong, got {weak.device}"
            )
        self.strong, self.weak = strong, weak
        self.last_alpha: Tensor | None = None  # (B, N) of the latest forward
        post = backbone_post_processing(strong.config)
        self._post = (post["logit_scale"], post["logit_softcap"])

    @property
    def config(self) -> Any:
        """The strong model's configuration."""
        return self.strong.config

    @property
    def device(self) -> torch.device:
        """The device of both models."""
        return self.strong.device

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The strong model's output with mixed logits (B, N, V), fp32.

        Args:
            input_ids: (B, T).
            attention_mask, position_ids: as the strong model takes them.
            kwargs: the controls of :meth:`generate`, and the strong model's other arguments, its
                cache among them.
        Raises:
            NotImplementedError: labels, embeddings instead of tokens, a static cache, or a mask of
                more than two dimensions. ValueError: a cache that the weak model has not filled.
        """
        controls = self._controls("WeakToStrong.forward", kwargs, input_ids.shape[0])
        named = {"attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        with self._guiding(controls):
            return self.strong(input_ids=input_ids, **kwargs)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """The strong model's own ``generate``, with controls per request.

        Args:
            inputs: (B, T), or pass ``input_ids``; left-padded with ``attention_mask``.
            kwargs: the fields of :class:`dualhead_ext.head.controls.Controls`, one number or one
                per request, and all arguments of the strong model's ``generate``. ``max_kl``
                limits the KL from the strong model's distribution.
        Raises:
            see :meth:`forward`; ValueError: no input_ids.
        """
        given = kwargs.get("input_ids") if inputs is None else inputs
        if given is None:
            raise ValueError("WeakToStrong.generate: input_ids must be given, got none")
        controls = self._controls("WeakToStrong.generate", kwargs, given.shape[0])
        with self._guiding(controls):
            strong: Any = self.strong
            return strong.generate(inputs, **kwargs)

    def _controls(self, operator: str, kwargs: dict[str, Any], batch: int) -> Controls:
        """Remove the controls from ``kwargs`` and return them as rows."""
        count = self.weak.dual_head_config.num_objectives
        return Controls.take(kwargs).rows(operator, batch, count, torch.float32, self.device)

    @contextmanager
    def _guiding(self, controls: Controls) -> Iterator[None]:
        """Within this context, the strong model returns mixed logits."""
        raw: list[Tensor] = []  # z_LM, before the strong model's f

        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            raw[:] = [output]

        def mix(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            output.logits = self._mixed(raw.pop(), kwargs, output, controls)
            return output

        hooks = [
            self.strong.get_output_embeddings().register_forward_hook(note),
            self.strong.register_forward_hook(mix, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _mixed(
        self, z_lm: Tensor, kwargs: dict[str, Any], output: Any, controls: Controls
    ) -> Tensor:
        ids = kwargs["input_ids"]
        given = controls.given()
        if given:  # the beams or samples of a prompt are adjacent rows
            controls = controls.repeat(ids.shape[0] // len(next(iter(given.values()))))
        max_kl, rows = controls.max_kl, replace(controls, max_kl=None)
        cache = cache_of(output)
        z_lm = z_lm.to(accumulator_dtype(z_lm.dtype))
        z_rm, alpha = self._weak_forward(_checked(kwargs), cache, rows, z_lm)
        config, post = self.weak.dual_head_config, self._post
        if config.mix == "probs":  # each side has its own f; a correction belongs to the strong one
            own = (config.logit_scale, config.logit_softcap)
            z_lm = postprocess(z_lm, *post)
            z_rm = postprocess(z_rm, *(own if config.reward_head == "full" else post))
            post = (1.0, 0.0)
        if max_kl is not None:
            alpha = capped_alpha(z_lm, z_rm, alpha, max_kl, config.mix, *post)
        self.last_alpha = alpha
        return mix_logits(z_lm, z_rm, alpha, config.mix, *post)

    def _weak_forward(
        self,
        kwargs: dict[str, Any],
        cache: Cache | None,
        controls: Controls,
        z_lm: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(z_RM (B, N, V) before any f, alpha (B, N)) at the positions of the strong model's logits
        ``z_lm``. A weak reward head that is a correction is added to ``z_lm``.
        """
        kept: list[Tensor] = []  # the inputs of the weak lm_head

        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            kept[:] = args

        head = self.weak.lm_head_module
        hook = head.register_forward_hook(note)
        try:
            companion = _companion(cache, self.weak, kwargs["input_ids"])
            self.weak(
                **_with_positions(self.weak, kwargs),
                **{GENERATION_CACHE: companion},
                use_cache=companion is not None,
                **controls.given(),
            )
        finally:
            hook.remove()
        _join(cache, companion)
        z_rm = head.reward_logits(kept[0], z_lm, controls.objective_weights)
        return z_rm, head.last_alpha


def _check_vocabularies(
    strong: PreTrainedModel, weak: DualHeadForCausalLM, strong_tokenizer: Any, weak_tokenizer: Any
) -> None:
    sizes = [model.get_output_embeddings().out_features for model in (strong, weak)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"WeakToStrong: weak must have strong's vocabulary of {sizes[0]}, got {sizes[1]}"
        )
    if strong_tokenizer is None or weak_tokenizer is None:
        return
    strong_ids, weak_ids = strong_tokenizer.get_vocab(), weak_tokenizer.get_vocab()
    other = sorted(
        token
        for token in strong_ids.keys() | weak_ids.keys()
        if strong_ids.get(token) != weak_ids.get(token)
    )
    if other:
        raise ValueError(
            f"WeakToStrong: weak_tokenizer must give every token the id of strong_tokenizer, got "
            f"{len(other)} others, such as {other[0]!r}"
        )


def _checked(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the strong model that the weak model gets too."""
    if kwargs.get("input_ids") is None or kwargs.get("labels") is not None:
        raise NotImplementedError(
            "WeakToStrong: input_ids alone are supported, neither embeddings nor labels"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise NotImplementedError(
            "WeakToStrong: attention_mask must be (B, columns): static caches are not supported"
        )
    return {
        "input_ids": kwargs["input_ids"],
        "attention_mask": mask,
        "logits_to_keep": kwargs.get("logits_to_keep", 0),
    }


def _with_positions(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add position_ids that count real tokens, as generate() does, if there is a mask."""
    mask = kwargs["attention_mask"]
    if mask is None or "position_ids" not in inspect.signature(model.forward).parameters:
        return kwargs
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return kwargs | {"position_ids": positions[:, -kwargs["input_ids"].shape[1] :]}


def _companion(cache: Cache | None, weak: PreTrainedModel, ids: Tensor) -> Cache | None:
    """The weak model's cache beside the strong model's, which already holds ``ids``."""
    if cache is None:
        return None
    if cache.is_compileable:
        raise NotImplementedError("WeakToStrong: static caches are not supported")
    companion = getattr(cache, "weak_cache", None)
    if companion is None:
        companion = DynamicCache(config=weak.config)
        vars(cache)["weak_cache"] = companion  # beside the cache's own attributes
    before = cache.get_seq_length() - ids.shape[1]
    if companion.get_seq_length() != before:
        raise ValueError(
            f"WeakToStrong: the cache must hold the {companion.get_seq_length()} positions that "
            f"the weak model has seen, got {before}"
        )
    return companion


def _join(cache: Cache | None, companion: Cache | None) -> None:
    """Add the weak cache's layers to the strong one, because reordering and cropping act on a
    Cache's layers.
    """
    if cache is not None and cache.layers[-1] is not companion.layers[-1]:
        cache.layers.extend(companion.layers)
