# SPDX-License-Identifier: Apache-2.0
"""Sample several responses to each of many prompts: on-policy training data.

A prompt is computed once for its n responses. Each response has its own random numbers, so the
responses to a prompt do not depend on the rest of the batch or on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ..data import HUMAN
from ..data.rendering import render_prompt
from ..model.hf_cache import GENERATION_CACHE

Message = dict[str, str]


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        text: the text, stripped, without special tokens.
        ended: True if the model ended its turn, False if the response was cut off.
    """

    text: str
    ended: bool


class RowNoise(LogitsProcessor):
    """Turns greedy decoding into sampling by adding Gumbel noise to ``scores / temperature``.

    The argmax of the sum is a draw from ``softmax(scores / temperature)``. Each row has its own
    generator.

    Args:
        seeds: one seed per row.
        temperature: above 0.
        device: device of the scores.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        return scores.float() / self._temperature - self.draw(scores)

    def draw(self, scores: Tensor) -> Tensor:
        """The next step's log of exponential noise: fp32, of the shape of ``scores`` (B, V)."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return noise.clamp_(min=1e-30).log_()


def row_seed(*parts: Any) -> int:
    """A seed from the string forms of ``parts``, such as (seed, prompt, number)."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def prompt_text(prompt: str | list[Message], tokenizer: Any) -> str:
    """A prompt as the model reads it: messages rendered by the chat template, a string as is."""
    if isinstance(prompt, str):
        return prompt
    return render_prompt(prompt, tokenizer)[0]


def encode_prompts(texts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T), padded on the left, with one BOS token if the tokenizer adds one."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        rows = [ids if ids[:1] == [bos] else [bos, *ids] for ids in rows]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def prefill(model: nn.Module, ids: Tensor, mask: Tensor) -> DynamicCache:
    """The cache of the prompts without their last token, which ``generate()`` reads itself."""
    cache = DynamicCache(config=model.config)
    if ids.shape[1] > 1:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
        # Call the model, not its decoder, which would not fill a gated model's gate cache.
        few = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions,
            **{GENERATION_CACHE: cache},
            use_cache=True,
            **few,
        )
    return cache


@torch.inference_mode()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | list[Message]],
    numbers: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[Response]]:
    """Sample responses to one batch of prompts with ``generate()``: a list for each prompt.

    Args:
        model: a causal language model, gated or not.
        prompts: strings, or message lists that end with a user message.
        numbers: numbers of the responses to sample; the response with a given number is the same
            in any batch, up to rounding.
        max_new_tokens: longer responses are cut off.
        temperature: above 0.
        seed: determines a response, together with the prompt's text and the response's number.
    """
    texts, n = [prompt_text(prompt, tokenizer) for prompt in prompts], len(numbers)
    ids, mask = (x.to(model.device) for x in encode_prompts(texts, tokenizer))
    seeds = [row_seed(seed, text, number) for text in texts for number in numbers]
    cache = prefill(model, ids, mask)
    cache.batch_repeat_interleave(n)
    out = model.generate(
        input_ids=ids.repeat_interleave(n, 0),
        attention_mask=mask.repeat_interleave(n, 0),
        **{GENERATION_CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([RowNoise(seeds, temperature, model.device)]),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    found = [response(row, tokenizer, ends) for row in out[:, ids.shape[1] :].tolist()]
    return [found[i : i + n] for i in range(0, len(found), n)]


def response(ids: list[int], tokenizer: Any, ends: Sequence[int]) -> Response:
    """The text of new tokens, up to an end token or a human turn that the model generated."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    said = text.partition(HUMAN)[0]
    return Response(said.strip(), end is not None or said != text)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
