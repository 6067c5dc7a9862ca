# SPDX-License-Identifier: Apache-2.0
"""The decoders that a gated head is compared with, on Hugging Face's own generate(): GenARM, ARGS,
best-of-n. Each needs a second model; a gated head does not.

They are logits processors, so batches, left padding, filters and stopping are generate()'s own.
Beams are refused, because the second model's cache is not reordered. Sources: GenARM arXiv
2410.08193 and its repository; ARGS arXiv 2402.01694 and its repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ..model.hf_cache import GENERATION_CACHE


class _Follower:
    """A second model and its cache, which follow the tokens that generate() appends."""

    def __init__(
        self, name: str, model: nn.Module, attention_mask: Tensor | None, forgets: bool = False
    ) -> None:
        self._name, self._model, self._mask = name, model, attention_mask
        self._window, self._types = _windows(name, model) if forgets else (0, set())
        # Sliding layers keep all columns too: a layer that drops columns cannot forget candidates.
        # The masks restrict attention to the window.
        self._cache = DynamicCache() if self._window else DynamicCache(config=model.config)
        self._seen: Tensor | None = None

    def feed(self, ids: Tensor, candidates: Tensor | None = None, **options: Any) -> Any:
        """The model's output for the new tokens in ``ids`` (B, T), and for each candidate (B, k) as
        the next token. Candidates attend to the text and to themselves only, and are removed from
        the cache again.
        """
        new, mask = self._new_columns(ids)
        k = 0 if candidates is None else candidates.shape[1]
        fed = new if candidates is None else torch.cat((new, candidates), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        last = positions[:, -1:] + 1
        positions = torch.cat((positions[:, -new.shape[1] :], last.expand(-1, k)), 1)
        out = self._model(
            input_ids=fed,
            attention_mask=self._attention(mask, new.shape[1], k) if k else mask,
            position_ids=positions,
            **{GENERATION_CACHE: self._cache},
            use_cache=True,
            **options,
        )
        if k:
            self._cache.crop(-k)
        return out

    def _new_columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens that are new, mask (B, T) of all tokens)."""
        if self._seen is None:
            self._mask = self._first_mask(ids)
            self._seen = ids[:, :0]
        known = self._seen.shape[1]
        if ids.shape[0] != self._seen.shape[0] or not torch.equal(ids[:, :known], self._seen):
            raise ValueError(
                f"{self._name}: generate() must append to the same rows (greedy or sampling, one "
                f"processor per call), got other rows: beams and assisted decoding are not "
                f"supported"
            )
        grown = ids.shape[1] - self._mask.shape[1]
        self._mask = torch.cat((self._mask, self._mask.new_ones(ids.shape[0], grown)), 1)
        self._seen = ids
        return ids[:, known:], self._mask

    def _first_mask(self, ids: Tensor) -> Tensor:
        if self._mask is None:
            return torch.ones_like(ids)
        rows, length = self._mask.shape
        if ids.shape[0] % rows or length != ids.shape[1]:
            raise ValueError(
                f"{self._name}: attention_mask must be that of the prompts {tuple(ids.shape)}, "
                f"got {tuple(self._mask.shape)}"
            )
        return self._mask.long().repeat_interleave(ids.shape[0] // rows, dim=0)

    def _attention(self, mask: Tensor, new: int, k: int) -> Tensor | dict[str, Tensor]:
        """The mask (B, 1, new + k, T + k) that is added to the scores: causal over the text; a
        candidate attends to the text and itself. A model with several kinds of layers gets one
        mask for each kind.
        """
        rows, length = mask.shape
        columns = torch.arange(length, device=mask.device)
        # A candidate is in the text's next column.
        places = torch.cat((columns[length - new :], columns.new_full((k,), length)))[:, None]
        over_text = (columns <= places)[None] & mask.bool()[:, None]
        eye = torch.eye(k, dtype=torch.bool, device=mask.device)
        over_candidates = torch.cat((eye.new_zeros(new, k), eye))[None].expand(rows, -1, -1)
        dtype = next(self._model.parameters()).dtype
        lowest = torch.finfo(dtype).min  # not -inf, with which padding rows would be NaN

        def added(seen: Tensor) -> Tensor:
            visible = torch.cat((seen, over_candidates), -1)[:, None]
            return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)

        if not self._window:
            return added(over_text)
        sliding = added(over_text & (columns > places - self._window))
        if not self._types:
            return sliding
        return {"full_attention": added(over_text), "sliding_attention": sliding}


def _windows(name: str, model: nn.Module) -> tuple[int, set[str]]:
    """(window of a model's sliding layers or 0, kinds of its layers if its config lists them).

    Raises:
        ValueError: layers with neither full nor sliding attention.
    """
    config = model.config.get_text_config(decoder=True)
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := types - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{name}: models must have full or sliding attention, got {', '.join(sorted(unknown))}"
        )
    window = getattr(config, "sliding_window", None) or 0
    if (types and "sliding_attention" not in types) or (
        not types and getattr(config, "use_sliding_window", True) is False
    ):
        window = 0
    return window, types


class AutoregressiveGuidance(LogitsProcessor):
    """GenARM: ``pi ~ pi_base prod_k pi_k^(a_k)``, a_k = 1 / beta_k, log-probabilities in fp32.

    Its repository divides the exponents by their sum and samples at temperature 1 / (1 + sum a),
    which is equivalent to this at temperature 1.

    Args:
        models: K causal language models over the backbone's vocabulary, one for each objective.
        strengths: K numbers, a_k.
        attention_mask: (B, T) of the prompts; default all ones.
    Raises:
        ValueError: not one strength per model, another vocabulary, or beams.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        strengths: Sequence[float],
        attention_mask: Tensor | None = None,
    ) -> None:
        if len(models) != len(strengths) or not models:
            raise ValueError(
                f"AutoregressiveGuidance: strengths must be one number for each model, got "
                f"{len(strengths)} for {len(models)}"
            )
        self._strengths = [float(s) for s in strengths]
        self._followers = [
            _Follower("AutoregressiveGuidance", model, attention_mask) for model in models
        ]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        total = torch.log_softmax(scores.float(), -1)
        for follower, strength in zip(self._followers, self._strengths, strict=True):
            logits = follower.feed(input_ids, logits_to_keep=1).logits[:, -1]
            if logits.shape != total.shape:
                raise ValueError(
                    f"AutoregressiveGuidance: models must have the backbone's vocabulary "
                    f"{total.shape[-1]}, got {logits.shape[-1]}"
                )
            total = total + strength * torch.log_softmax(logits.float(), -1)
        return total


class TrajectoryGuidance(LogitsProcessor):
    """ARGS: among the backbone's k most probable tokens, ``score = logit + w r(text + token)``;
    other tokens are excluded. Greedy decoding takes the best score; sampling draws from
    ``softmax(score / T)`` over the k.

    All candidates of all rows are scored in one pass over a shared cache of the text.

    Args:
        reward_model: an AutoModelForSequenceClassification with one label over the backbone's
            tokens.
        weight: w; the paper uses 1.0 and 1.5.
        k: the number of candidates. Default 10.
        attention_mask: (B, T) of the prompts; default all ones.
    Raises:
        ValueError: k < 1, more than one label, beams.
    """

    def __init__(
        self,
        reward_model: nn.Module,
        weight: float,
        k: int = 10,
        attention_mask: Tensor | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"TrajectoryGuidance: k must be at least 1, got {k}")
        self._score = _one_score("TrajectoryGuidance", reward_model)
        self._weight, self._k = float(weight), k
        self._follower = _Follower(
            "TrajectoryGuidance", reward_model.base_model, attention_mask, forgets=True
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top, tokens = scores.float().topk(min(self._k, scores.shape[-1]), dim=-1)
        hidden = self._follower.feed(input_ids, tokens).last_hidden_state
        rewards = self._score(hidden[:, -tokens.shape[1] :]).squeeze(-1).float()
        total = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        return total.scatter(1, tokens, top + self._weight * rewards)


def _one_score(name: str, reward_model: nn.Module) -> nn.Module:
    score = getattr(reward_model, "score", None)
    if score is None or getattr(score, "out_features", None) != 1:
        raise ValueError(
            f"{name}: reward_model must be a sequence classifier with one label (num_labels=1), "
            f"got {type(reward_model).__name__} with {getattr(score, 'out_features', 'no')} labels"
        )
    return score


@torch.no_grad()
def sequence_rewards(reward_model: nn.Module, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The scalar reward at each row's last unmasked token: (B, T), (B, T) -> (B,) fp32.

    The last token is found by the mask, not by the padding token's id. transformers uses the id,
    which is wrong if the padding token is also the end token.

    Raises:
        ValueError: more than one label, or a row with no token.
    """
    score = _one_score("sequence_rewards", reward_model)
    mask = attention_mask.long()
    if bool((mask.sum(1) == 0).any()):
        raise ValueError("sequence_rewards: attention_mask must keep a token of each row, got none")
    hidden = reward_model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).last_hidden_state
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return score(hidden[torch.arange(len(last), device=last.device), last]).squeeze(-1).float()


# --- one function for each decoder ----------------------------------------------------------------


def plain(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Plain generate(): the backbone, or a gated head with its own controls.

    Args:
        model: a causal language model.
        inputs: input_ids and attention_mask (B, T), left-padded, as for all decoders here.
        options: arguments of generate().
    Returns:
        (B, T + new) token ids.
    """
    return model.generate(**inputs, **options)


def genarm(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    reward_models: Sequence[nn.Module],
    strengths: Sequence[float],
    **options: Any,
) -> Tensor:
    """:class:`AutoregressiveGuidance` of ``model``; returns as :func:`plain`."""
    guide = AutoregressiveGuidance(reward_models, strengths, inputs.get("attention_mask"))
    return plain(model, inputs, logits_processor=LogitsProcessorList([guide]), **options)


def args(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    reward_model: nn.Module,
    weight: float = 1.0,
    k: int = 10,
    **options: Any,
) -> Tensor:
    """:class:`TrajectoryGuidance` of ``model``; returns as :func:`plain`."""
    guide = TrajectoryGuidance(reward_model, weight, k, inputs.get("attention_mask"))
    return plain(model, inputs, logits_processor=LogitsProcessorList([guide]), **options)


def best_of_n(
    model: nn.Module,
    inputs: dict[str, Tensor],
    *,
    reward: Callable[[Tensor, Tensor], Tensor],
    n: int,
    pad_token_id: int,
    **options: Any,
) -> Tensor:
    """For each prompt, the one of n samples with the highest reward; ties go to the first.

    Args:
        reward: maps ids and mask (B n, T + new) to (B n,), such as :func:`sequence_rewards` of a
            model.
        n: samples per prompt.
        pad_token_id: the token that generate() writes after a row's end.
    Returns:
        (B, T + new) token ids.
    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"best_of_n: n must be at least 1, got {n}")
    options = {"do_sample": True} | options | {"num_return_sequences": n}
    ids = plain(model, inputs, pad_token_id=pad_token_id, **options)
    start = inputs["input_ids"].shape[1]
    prompt_mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    written = _written(ids[:, start:], model.generation_config.eos_token_id)
    mask = torch.cat((prompt_mask.repeat_interleave(n, dim=0).long(), written), 1)
    best = reward(ids, mask).view(-1, n).argmax(1)
    return ids.view(-1, n, ids.shape[1])[torch.arange(len(best), device=ids.device), best]


def _written(new: Tensor, eos: int | list[int] | None) -> Tensor:
    """(B, new) int64: 1 up to and including the first end token, 0 after it."""
    if eos is None:
        return torch.ones_like(new)
    ends = torch.isin(new, torch.as_tensor(eos, device=new.device)).long()
    return (ends.cumsum(1) - ends == 0).long()


# Decoders by name; each takes a model and inputs, and other arguments by name.
DECODERS: dict[str, Callable[..., Tensor]] = {
    "plain": plain,
    "genarm": genarm,
    "args": args,
    "best_of_n": best_of_n,
}
