# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching of a gated model: controls per request, and a paged cache that
also holds the gate's state (`paged_gate`).
"""

from __future__ import annotations

import copy
import uuid
from typing import Any, cast

import transformers
from packaging.version import Version
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from ..head.controls import Controls
from ..head.request_controls import numbers_of_requests, rows_of_requests
from .generate import add_controls_of, strength_of
from .paged_gate import PagedGate
from .request_sampling import RequestSampling

OLDEST = "5.23.0"  # transformers; older paged caches have another layout


class GatedBatchingManager(ContinuousBatchingManager):
    """transformers' manager for a gated model: `add_request` and `add_requests` take the fields of
    :class:`dualhead_ext.head.controls.Controls`, and ``kl``, as ``generate()`` does.
    """

    alphas: dict[str, list[float]]  # request -> alpha of each token so far

    # transformers constructs the manager itself, so its class is changed afterwards.
    @classmethod
    def of(cls, manager: Any) -> GatedBatchingManager:
        """Change the class of transformers' manager to this one."""
        manager.__class__ = cls
        manager.alphas = {}
        # Further arguments that a request may have; `add_request` has checked them.
        manager.logit_processor.supported_keys |= dict.fromkeys(Controls.NAMES, object)
        return manager

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        *args: Any,
        output_gate: bool = False,
        **kwargs: Any,
    ) -> str | None:
        """As transformers'; kwargs may hold controls, one number each (objective_weights: K).

        Args:
            output_gate: keep alpha of each token until :meth:`take_alpha` takes it.
        Raises:
            TypeError, ValueError: a wrong control. The request is not queued.
        """
        if (own := getattr(input_ids, "controls", None)) is None:
            place = (self.model, "add_request", kwargs, self.generation_config)
            own = controls_of_requests(*place, 1)[0]
        if output_gate:  # known before the request is queued
            request_id = uuid.uuid4().hex if request_id is None else request_id
            self.alphas[request_id] = []
        add: Any = super().add_request
        return add(input_ids, request_id, *args, **own, **kwargs)

    def take_alpha(self, request_id: str) -> list[float] | None:
        """Return alpha of each token so far of a request with ``output_gate``, and stop keeping it.
        None for another request.
        """
        return self.alphas.pop(request_id, None)

    def sample_per_request(self) -> None:
        """Let each request set ``seed``, ``temperature``, ``top_k``, ``top_p`` and ``min_p``.
        Requests without a seed are greedy. It replaces all logits processors of the generation
        config. Call it before :meth:`start`.

        Raises:
            ValueError: the generation config samples, from one generator for all requests.
        """
        config: Any = self.generation_config
        if config.do_sample:
            raise ValueError("sample_per_request: do_sample must be False in the generation config")
        chain: Any = self.logit_processor
        chain.logits_processor[:] = [RequestSampling()]
        chain.tensors_required, chain.do_processing = 1, True
        chain.supported_keys |= RequestSampling.supported_kwargs

    def add_requests(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
        """As transformers'; kwargs may hold controls, one number or one per request."""
        place = (self.model, "add_requests", kwargs, self.generation_config)
        return super().add_requests(prompts_with_controls(*place, inputs), *args, **kwargs)

    def _create_batch_processor(self) -> Any:
        head, model = self.model.lm_head_module, self.model
        kept = getattr(self, "batch_processor", None)
        if kept is not None:
            if kept.cache.paged_gate.is_of(head):
                return super()._create_batch_processor()
            self.batch_processor = None  # its shared prefixes were computed with older weights
        pages = PagedGate(head, model.config.get_text_config(), model.dtype)
        self.model = cast(Any, _ModelOfCache(model, pages.config))
        try:
            processor: Any = super()._create_batch_processor()
        finally:
            self.model = model
        processor.cache.paged_gate = pages
        return processor

    def _generation_step(self) -> None:
        processor: Any = self.batch_processor
        requests = processor.inputs_and_outputs.requests_in_batch
        states = [request.state for request in requests if request.has_new_token]
        given = [state.logit_processor_kwargs for state in states]
        model: Any = self.model
        count = model.dual_head_config.num_objectives
        processor.cache.paged_gate.controls = rows_of_requests(given, count)
        super()._generation_step()
        asking = [(i, kept) for i, s in enumerate(states) if (kept := self._kept(s)) is not None]
        if asking:
            alpha = model.lm_head_module.last_alpha.flatten().tolist()
            for i, kept in asking:
                kept.append(alpha[i])

    def _kept(self, state: Any) -> list[float] | None:
        return self.alphas.get(state.request_id)


class _ModelOfCache:
    """The model with a config that includes the gate's layers, for creating the paged cache. All
    other attributes are the model's, since another thread may read them meanwhile.
    """

    def __init__(self, model: Any, config: Any) -> None:
        self._model, self.config = model, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Prompt(list):
    """Token ids with the controls of their request. transformers passes the object on unchanged."""

    def __init__(self, ids: Any, controls: dict[str, Any]) -> None:
        super().__init__(ids)
        self.controls = controls


def controls_of_requests(
    model: Any, operator: str, kwargs: dict[str, Any], generation_config: Any, count: int
) -> list[dict[str, Any]]:
    """Remove the controls from kwargs and return those of each of ``count`` requests, as Python
    numbers. Those that kwargs do not have are taken from the generation config.

    Raises:
        TypeError, ValueError: a wrong control.
    """
    add_controls_of(generation_config, kwargs)
    config = model.dual_head_config
    if (kl := kwargs.pop("kl", None)) is not None:
        kwargs["strength"] = strength_of(config.kl_curve, kl, kwargs)
    return numbers_of_requests(operator, Controls.take(kwargs), count, config.num_objectives)


def prompts_with_controls(
    model: Any,
    operator: str,
    kwargs: dict[str, Any],
    generation_config: Any,
    inputs: list[list[int]],
) -> list[list[int]]:
    """The prompts, each with its controls; see :func:`controls_of_requests`."""
    controls = controls_of_requests(model, operator, kwargs, generation_config, len(inputs))
    # Prompts that already have controls keep them: generate_batch calls add_requests.
    return [
        ids if isinstance(ids, _Prompt) else _Prompt(ids, own)
        for ids, own in zip(inputs, controls, strict=True)
    ]


def check_version() -> None:
    """Raise NotImplementedError for a transformers whose paged cache has another layout."""
    if Version(transformers.__version__) < Version(OLDEST):
        raise NotImplementedError(
            f"continuous batching: the gated head needs transformers {OLDEST} or newer, got "
            f"{transformers.__version__}; use generate"
        )


def batching_config(config: Any) -> Any:
    """The configuration of continuous batching, adjusted for a gated model.

    Raises:
        NotImplementedError: transformers is too old; CUDA graphs, compilation or asynchronous
            batches.
    """
    check_version()
    config = transformers.ContinuousBatchingConfig() if config is None else copy.copy(config)
    graphs = config.use_cuda_graph
    asked = {
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "use_async_batching": config.use_async_batching,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level,
    }
    for name, value in asked.items():
        if value:
            raise NotImplementedError(
                f"continuous batching: {name} is not supported by the gated head, whose controls "
                "the host reads for each batch; leave it out"
            )
    config.use_cuda_graph = config.use_async_batching = False
    config.max_blocks_per_request = 0  # decoding by block tables would not keep the gate's state
    return config
