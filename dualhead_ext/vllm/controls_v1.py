# SPDX-License-Identifier: Apache-2.0
"""Controls of requests in vLLM's first model runner, which tells its logits processors the place of
each request before each forward. ``RequestControlsK`` is the processor for K objectives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from .request_table import Request, RequestTable
from .requests import alpha_name_of, by_objectives, controls_of


class RequestControls(LogitsProcessor):
    """Updates the engine's :class:`.request_table.RequestTable`; does not change logits."""

    num_objectives = 1

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for a wrong control, before the request is queued."""
        controls_of(sampling_params.extra_args, cls.num_objectives)
        alpha_name_of(sampling_params.extra_args, sampling_params.n)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._table = RequestTable.of(vllm_config, self.num_objectives, device)
        self._requests: dict[int, Request] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        if process_dict_updates(self._requests, batch_update, self._request):
            self._table.replace(self._requests)
        asking = [
            (row, request.alpha_name, len(request.output))
            for row, request in sorted(self._requests.items())
            if request.alpha_name is not None
        ]
        self._table.expect(asking)

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def _request(self, params: SamplingParams, prompt: Any, output: list[int]) -> Request | None:
        controls = controls_of(params.extra_args, self.num_objectives)
        name = alpha_name_of(params.extra_args)
        return Request(controls, name, output) if controls or name else None


__getattr__ = by_objectives(RequestControls)
