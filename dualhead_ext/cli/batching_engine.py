# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching as an engine for a server: requests come from coroutines, and
one thread decodes all of them together.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from .decoding import context_of

# Positions of a page of the cache, and of prompts and new tokens in one forward pass.
_PAGE, _BATCH = 32, 512
# Default number of positions of all requests on the CPU, where transformers would take 60 % of the
# machine's memory.
_POSITIONS = 8192


class EngineError(Exception):
    """A request failed in the engine, or the engine has stopped."""


@dataclass(frozen=True)
class Decoding:
    """How a request is decoded.

    Attributes:
        max_new_tokens: the largest number of new tokens.
        ends: token ids that end the text.
        controls: of the gated head.
        sampling: seed and filters; empty for greedy decoding.
        output_gate: whether alpha of each token is kept.
    """

    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    controls: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    output_gate: bool = False


class Request:
    """A request that the engine decodes. Iterate over it for its tokens.

    Attributes:
        alpha: alpha of each token, if the request asked for it.
    """

    def __init__(self, manager: Any, ids: list[int], decoding: Decoding) -> None:
        self._manager, self._ids, self._decoding = manager, ids, decoding
        self._name = uuid.uuid4().hex
        self.alpha: list[float] = []

    async def tokens(self) -> AsyncGenerator[int]:
        """The new tokens as they come. Closing the iterator cancels the request.

        Raises:
            EngineError: the engine failed, or is stopping.
        """
        manager, own = self._manager, self._decoding
        outputs: asyncio.Queue = asyncio.Queue()
        manager.register_result_handler(self._name, outputs.put_nowait)
        finished, count = False, 0
        try:
            queued = manager.add_request(
                self._ids,
                request_id=self._name,
                max_new_tokens=own.max_new_tokens,
                eos_token_id=sorted(own.ends) or -1,
                streaming=True,
                output_gate=own.output_gate,
                **own.controls,
                **own.sampling,
            )
            if queued is None:
                finished = True
                raise EngineError("the server is stopping")
            while not finished:
                output = await outputs.get()
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineError(output.error)
                for token in output.generated_tokens[count:]:
                    count += 1
                    yield token
        finally:
            self.alpha = (manager.take_alpha(self._name) or [])[:count]
            if not finished:
                manager.cancel_request(self._name)
                with manager.output_router._lock:  # transformers drops it when a request ends
                    manager.output_router.result_handlers.pop(self._name, None)


class BatchingEngine:
    """Continuous batching of a gated model.

    Attributes:
        max_length: the largest number of positions of a request, prompt and new tokens.
        ignored: settings of the backbone's generation config that this engine does not apply.
    """

    def __init__(self, model: Any, tokenizer: Any, positions: int | None = None) -> None:
        """positions: size of the cache, for all requests together; default: the model's context or
        8192, whichever is smaller, on the CPU; on a GPU, transformers' choice.

        Raises:
            ValueError: the cache does not hold a request of two tokens.
            NotImplementedError: the versions or the backbone do not support it.
        """
        import transformers

        from ..model.continuous_batching import check_version

        check_version()  # older releases lack what is imported next
        from transformers.generation.continuous_batching.model_runner import (
            infer_max_single_request_tokens,
        )

        self.model, self.tokenizer = model, tokenizer
        context = context_of(model)
        if positions is None and model.device.type == "cpu":
            positions = min(context or _POSITIONS, _POSITIONS)
        sizes: dict[str, Any] = {"page_size": _PAGE}
        if positions is not None:
            sizes |= {"num_blocks": -(-positions // _PAGE), "max_batch_tokens": _BATCH}
        given = model.generation_config
        ends = given.eos_token_id
        self.ends = frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)
        if tokenizer.eos_token_id is not None:
            self.ends |= {tokenizer.eos_token_id}
        own = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
        config = transformers.ContinuousBatchingConfig(**sizes)
        self._manager = model.init_continuous_batching(own, config)
        self._manager.sample_per_request()
        self._manager.warmup()  # allocates the cache here, where an error can be reported
        fits = infer_max_single_request_tokens(self._manager.batch_processor.cache)
        self.max_length = fits if context is None else min(fits, context)
        if self.max_length < 2:
            raise ValueError(f"expected a cache of at least {_PAGE} positions, got {positions}")
        self.ignored = [
            f"{name}={value}"
            for name in ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids")
            if (value := getattr(given, name, None)) not in (None, 0, 1.0)
        ]

    @property
    def alive(self) -> bool:
        """Whether the engine decodes requests."""
        status = self._manager.background_thread_status
        return self._manager.is_running() and status.fatal_error is None

    def start(self) -> None:
        """Start the thread that decodes."""
        self._manager.start()

    def stop(self) -> None:
        """Stop the thread. Requests that are not finished fail."""
        self._manager.stop(hard_stop=True)

    def request(self, ids: list[int], decoding: Decoding) -> Request:
        """A request, which is queued when its tokens are first asked for."""
        return Request(self._manager, ids, decoding)
