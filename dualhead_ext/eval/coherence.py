# SPDX-License-Identifier: Apache-2.0
"""Coherence: the similarity of a response and its prompt, as the cosine of their embeddings (ARGS).

ARGS uses the embedder ``princeton-nlp/sup-simcse-bert-base-uncased``; use it, or another sentence
embedder, if available. The backbone's own mean hidden states are a substitute. Figures of different
embedders are not comparable, so each embedder has a ``name``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .judging import Interval, bootstrap


@dataclass(frozen=True)
class Embedder:
    """Maps texts to vectors.

    Attributes:
        name: its name in tables.
        embed: n texts -> (n, e) fp32.
    """

    name: str
    embed: Callable[[Sequence[str]], Tensor]


def sentence_embedder(
    name_or_path: str, batch_size: int = 32, device: torch.device | str = "cpu"
) -> Embedder:
    """The mean of a transformers AutoModel's last hidden states over real tokens. Texts are cut to
    the model's maximal length.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = AutoModel.from_pretrained(name_or_path).eval().to(device)
    return _mean_pooling(f"{name_or_path} (mean pooling)", model, tokenizer, batch_size)


def backbone_embedder(model: nn.Module, tokenizer: Any, batch_size: int = 32) -> Embedder:
    """The mean of a causal language model's own last hidden states. It is not a sentence embedder;
    its name says so.
    """
    name = f"mean hidden state of {model.config._name_or_path or type(model).__name__}"
    return _mean_pooling(name, model.get_decoder(), tokenizer, batch_size)


def _mean_pooling(name: str, model: nn.Module, tokenizer: Any, batch_size: int) -> Embedder:
    longest = getattr(model.config, "max_position_embeddings", None)
    device = next(model.parameters()).device

    def rows(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, right-padded: padding on the right does not change causal hidden states."""
        each = [tokenizer(text or " ", truncation=False)["input_ids"][:longest] for text in texts]
        width = max(len(ids) for ids in each)
        ids = torch.zeros(len(each), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, found in enumerate(each):
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return ids.to(device), mask.to(device)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), batch_size):
            ids, mask = rows(texts[start : start + batch_size])
            hidden = model(input_ids=ids, attention_mask=mask)[0].float()
            kept = mask[..., None].float()
            parts.append(((hidden * kept).sum(1) / kept.sum(1)).cpu())
        return torch.cat(parts)

    return Embedder(name, embed)


def coherence(
    embedder: Embedder, prompts: Sequence[str], responses: Sequence[str], seed: int = 0
) -> Interval:
    """The mean cosine of prompt and response, with a bootstrap interval over pairs. An empty text
    counts as a space, as in ARGS.

    Raises:
        ValueError: no pairs, or not as many prompts as responses.
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(
            "coherence: prompts and responses must have one length and not be empty, got "
            f"{len(prompts)} and {len(responses)}"
        )
    vectors = (embedder.embed(texts) for texts in (prompts, responses))
    cosines = torch.cosine_similarity(*vectors, dim=-1).tolist()
    return bootstrap(cosines, lambda rows: sum(rows) / len(rows), seed=seed)
