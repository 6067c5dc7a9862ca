# SPDX-License-Identifier: Apache-2.0
"""The check of controls for vLLM's second model runner, which needs Triton: the default on GPUs.
``RequestControlsK`` is the processor for K objectives. `model_state_v2` does the rest.

No GPU has run it; the tests run it on a CPU, with Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from .requests import alpha_name_of, by_objectives, controls_of


class RequestControls(LogitsProcessor):
    """Checks a request's controls; does not change logits."""

    num_objectives = 1

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for a wrong control, before the request is queued."""
        controls_of(sampling_params.extra_args, cls.num_objectives)
        alpha_name_of(sampling_params.extra_args, sampling_params.n)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        return logits


__getattr__ = by_objectives(RequestControls)
