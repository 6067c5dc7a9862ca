# SPDX-License-Identifier: Apache-2.0
"""Controls of requests in vLLM's second model runner, which gets the inputs of a model's
forward from the model state. No GPU has run it; the tests run it on a CPU, with Triton's
interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .request_table import Request
from .requests import alpha_name_of, controls_of


class GatedModelState(DefaultModelState):
    """Gives each position of a forward its request's controls, in a buffer with a fixed address, as
    CUDA graphs require.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._table = model.requests
        self._objectives = model.dual_head.config.num_objectives
        self._prompt_lengths: dict[int, int] = {}
        self._rows = torch.zeros(self.max_num_tokens, self._table.width, device=device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        extra_args = new_req_data.sampling_params.extra_args
        controls, name = controls_of(extra_args, self._objectives), alpha_name_of(extra_args)
        self._prompt_lengths[req_index] = len(new_req_data.prompt_token_ids)
        self._table.put(req_index, Request(controls, name) if controls or name else None)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        count = input_batch.num_tokens_after_padding
        slots, starts = input_batch.idx_mapping, input_batch.query_start_loc
        rows = self._table.of_positions(starts[: len(slots) + 1], count, slots)
        self._rows[:count] = rows
        asking = []
        for row, slot in enumerate(input_batch.idx_mapping_np.tolist()):
            request = self._table.at(slot)
            if request is not None and request.alpha_name is not None:
                seen = input_batch.num_computed_tokens_np[row]
                seen += input_batch.num_scheduled_tokens[row]
                if (index := int(seen) - self._prompt_lengths[slot]) >= 0:
                    asking.append((row, request.alpha_name, index))
        self._table.expect(asking)
        inputs = super().prepare_inputs(input_batch, req_states)
        return inputs | {"control_rows": self._rows[:count]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs | {"control_rows": self._rows[:num_tokens]}
