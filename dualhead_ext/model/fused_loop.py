# SPDX-License-Identifier: Apache-2.0
"""The fused decoding loop of ``generate()``: the decode step maps hidden states to tokens and
returns no logits.

transformers' own loop takes logits from the model, copies them, runs processors over them and
takes an argmax or a sample. If the only processors are filters that the fused step has too, the
loop here lets the step choose the token. It replaces ``_sample``, which ``generate()`` calls for
greedy search and sampling after it has resolved every option. ``custom_generate`` callables have
the same signature, so :func:`fused_sample` can be passed as one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from ..head.cache import GateCache, seeds_of
from ..head.controls import GREEDY, Sampling
from ..head.token_choice import STATUS_NON_FINITE, choose_token
from ..ops.logits import accumulator_dtype
from .generation_options import Decoding, filters_of, obstacle
from .hf_cache import GENERATION_CACHE, cache_in, cache_of, gate_layer

FP32 = torch.float32

# Options that need another loop.
_OTHER_LOOPS = (
    *("num_beams", "num_beam_groups", "constraints", "force_words_ids", "penalty_alpha"),
    *("dola_layers", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"),
    *("use_mtp", "speculation_type", "custom_generate"),
)


def decoding_of(kwargs: dict[str, Any], batch_size: int, config: Any) -> Decoding | None:
    """Remove ``fused``, ``seeds`` and ``generator`` from the arguments of ``generate()``. None if
    an option needs another loop.

    Args:
        batch_size: number of prompts. config: the model's generation config.
    Raises:
        TypeError, ValueError: a wrong type or shape, or an option that needs another loop although
            the fused one is required.
    """
    fused, seeds = kwargs.pop("fused", None), kwargs.pop("seeds", None)
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"generate: fused must be True, False or None, got {fused!r}")
    if seeds is not None:
        if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
            got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
            raise TypeError(f"generate: seeds must be an int64 tensor, got {got}")
        if seeds.shape != (batch_size,):
            raise ValueError(f"generate: seeds must be ({batch_size},), got {tuple(seeds.shape)}")
    given = cache_in(kwargs) is not None
    asked = Sampling(seeds=seeds, generator=kwargs.pop("generator", None))
    decoding = Decoding(fused, asked, keep_cache=given)
    if kwargs.get("custom_generate") is fused_sample:
        # transformers would pass neither the streamer nor the tokenizer to a custom loop.
        del kwargs["custom_generate"]
        decoding.fused = True
    config = kwargs.get("generation_config") or config
    for name in _OTHER_LOOPS:
        value = kwargs.get(name, getattr(config, name, None))
        if value not in (None, 1, False):
            decoding.refuse(name)
            return None
    return decoding


def _seeds(asked: Sampling, cache: GateCache) -> Tensor:
    """The seeds (B,) of this call. Copies of a request (num_return_sequences) get different seeds,
    since equal seeds would sample equal text.
    """
    if asked.seeds is None:
        cache.seeds = None  # drop those of an earlier call
        return seeds_of("generate", cache, None, asked.generator)
    copies = cache.batch_size // asked.seeds.shape[0]
    numbers = torch.arange(copies, device=asked.seeds.device).repeat(len(asked.seeds))
    cache.seeds = (asked.seeds.repeat_interleave(copies) + numbers).to(cache.device)
    return cache.seeds


def _sampling(asked: Sampling, head: Any, cache: GateCache, filters: dict[str, float]) -> Sampling:
    """Filters and seeds as rows for the step. transformers has checked the filters' values."""
    dtype = accumulator_dtype(head.hidden_dtype)
    rows: dict[str, Any] = {
        name: cache.per_row(name, value, torch.int32 if name == "top_k" else dtype)
        for name, value in filters.items()
    }
    return Sampling(True, **rows, seeds=_seeds(asked, cache)).rows("generate", cache, dtype)


def token_of_logits(logits: Tensor, sampling: Sampling, cache: GateCache) -> tuple[Tensor, Tensor]:
    """(token, status) from logits (B, V), as the step would choose. Used for a prompt, which has no
    step.
    """
    token, _, failed = choose_token(logits, sampling.operands("generate", cache))
    if sampling.do_sample:
        cache.draws += 1
    return token, failed.int() * STATUS_NON_FINITE


class _Finished:
    """Tells the host whether all rows are finished, without waiting for the device at each token.

    With ``late``, the flag of a step is copied to pinned memory after it and read one step later,
    when the next step is queued. So one step too many runs at the end, and the loop drops its
    tokens. Without ``late`` the flag is read at once, which costs nothing on the CPU.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self.late, pinned = late, late and device.type == "cuda"
        self._events = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._flags = [torch.zeros((), dtype=torch.bool, pin_memory=pinned) for _ in range(2)]
        self._steps = 0

    def __call__(self, unfinished: Tensor) -> bool:
        if not self.late:
            return not bool(unfinished.any())
        new, old = self._steps % 2, (self._steps + 1) % 2
        self._steps += 1
        self._flags[new].copy_(~unfinished.any(), non_blocking=True)
        if self._events[new] is not None:
            self._events[new].record()
            if self._steps > 1:
                self._events[old].synchronize()
        return self._steps > 1 and bool(self._flags[old])


def _warn_of_status(status: Tensor) -> None:
    rows = status.nonzero().flatten().tolist()
    if rows:
        warnings.warn(
            f"generate: rows {rows} became infinite or NaN; their text is meaningless from there "
            "on",
            RuntimeWarning,
            stacklevel=3,
        )


class _Loop:
    """One run of the fused loop, and its state between tokens."""

    def __init__(
        self, model: Any, decoding: Decoding, criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.model, self.decoding, self.criteria = model, decoding, criteria
        self.config, self.streamer = config, streamer
        self.device = model.lm_head_module.weight.device
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = config._pad_token_tensor if ends else None
        if ends and pad is None:
            raise ValueError("generate: pad_token_id must be given if rows can end, got None")
        self.pad = None if pad is None else pad.to(self.device)
        kept = decoding.keep_cache or config.return_dict_in_generate
        late = self.device.type == "cuda" and streamer is None and not kept
        self.finished = _Finished(self.device, late)
        self.status = torch.zeros((), dtype=torch.int32, device=self.device)  # maximum per row

    def begin(self, input_ids: Tensor, filters: dict[str, float], model_kwargs: dict) -> Any:
        """Run the prompt and prepare the arguments that the step needs to sample."""
        self.decoding.begun = True
        model_kwargs["dualhead_decoding"] = self.decoding
        out = self.model._prefill(input_ids, self.config, model_kwargs)
        cache = cache_of(out)  # RecurrentGemma does not return it
        cache = cache_in(model_kwargs) if cache is None else cache
        self.cache = gate_layer(cache).gate_cache
        head = self.model.lm_head_module
        if not self.decoding.knows_f:
            self.decoding.refuse("what the backbone does to its logits")
        self.sampling = GREEDY
        if self.config.do_sample:
            self.sampling = _sampling(self.decoding.asked, head, self.cache, filters)
        if self.decoding.knows_f:
            self.decoding.sampling = self.sampling
        else:  # the backbone changes the logits, so each token is chosen from its logits here
            del model_kwargs["dualhead_decoding"]
        return out

    def take_token(self, out: Any, input_ids: Tensor, unfinished: Tensor) -> tuple[Tensor, Tensor]:
        """(``input_ids`` with the new token, which rows are unfinished)."""
        if out.logits.is_floating_point():
            logits = out.logits[:, -1].to(self.device, torch.promote_types(out.logits.dtype, FP32))
            token, status = token_of_logits(logits, self.sampling, self.cache)
        else:
            token, status = out.logits.to(self.device).unbind(1)
        # Make new tensors: under CUDA graphs the next replay overwrites ``out``.
        self.status = torch.maximum(self.status, status)
        token = token if self.pad is None else torch.where(unfinished, token, self.pad)
        input_ids = torch.cat((input_ids, token[:, None]), dim=-1)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return input_ids, unfinished & ~self.criteria(input_ids, None)

    def run(
        self, input_ids: Tensor, filters: dict[str, float], model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Cache]:
        """(sequences, cache) from a prompt."""
        model, limit = self.model, self.criteria.max_length
        forward = model.__call__
        if model._valid_auto_compile_criteria(model_kwargs, self.config):
            forward = model.get_compiled_call(self.config.compile_config)
        out = self.begin(input_ids, filters, model_kwargs)
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=self.device)
        with model._optimize_model_for_decode():
            while True:
                model_kwargs = model._update_model_kwargs_for_generation(out, model_kwargs)
                input_ids, unfinished = self.take_token(out, input_ids, unfinished)
                done = self.finished(unfinished)
                if done or (limit is not None and input_ids.shape[1] >= limit):
                    break
                inputs = model.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=1, **model_kwargs
                )
                out = forward(**inputs, return_dict=True)
        if self.streamer is not None:
            self.streamer.end()
        if done and self.finished.late:
            input_ids = input_ids[:, :-1]
        _warn_of_status(self.status)
        return input_ids, cache_in(model_kwargs)


@torch.no_grad()
def fused_sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: list,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    dualhead_decoding: Decoding | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Greedy search or sampling, one fused step per token. Arguments and results are those of
    transformers' ``_sample``. The first token is chosen from the prompt's logits.

    Raises:
        ValueError: an option that the loop does not support; see :func:`obstacle`.
    """
    decoding = dualhead_decoding or Decoding(fused=True)
    found = obstacle(generation_config, logits_processor, synced_gpus, model_kwargs)
    if found is not None:
        raise ValueError(f"fused_sample: the fused decoding loop does not support {found}")
    loop = _Loop(model, decoding, stopping_criteria, generation_config, streamer)
    filters = cast(dict, filters_of(logits_processor, generation_config.do_sample))
    sequences, cache = loop.run(input_ids.to(loop.device), filters, model_kwargs)
    sequences = sequences.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    kept: dict[str, Any] = {GENERATION_CACHE: cache}
    return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, sequences), **kept)


def sample(
    model: Any,
    transformers_loop: Callable[..., Any],
    input_ids: Tensor,
    arguments: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> Any:
    """The fused loop if all options allow it, otherwise transformers' own. arguments: those of
    transformers' ``_sample``.

    Raises:
        ValueError: an argument needs the fused loop, but an option rules it out.
    """
    decoding = model_kwargs.pop("dualhead_decoding", None) or Decoding()
    config, processors = arguments["generation_config"], arguments["logits_processor"]
    found = obstacle(config, processors, arguments["synced_gpus"], model_kwargs)
    if found is None and decoding.fused is not False:
        return fused_sample(
            model, input_ids, dualhead_decoding=decoding, **arguments, **model_kwargs
        )
    decoding.refuse(found or "fused=False")
    return transformers_loop(input_ids, **arguments, **model_kwargs)
