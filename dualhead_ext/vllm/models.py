# SPDX-License-Identifier: Apache-2.0
"""The gated models: vLLM's own models with a gated head that computes the logits. The
``DualHead...`` classes of :data:`dualhead_ext.model.served_folder.ARCHITECTURES` are attributes of
this module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.models import ModelRegistry

from ..config import DualHeadConfig
from ..model.head_files import check_head_state
from ..model.head_folder import read_config, read_head_folder
from ..model.served_folder import ARCHITECTURES
from .head import ServedHead
from .request_table import RequestTable


class Gated:
    """Mixin of a gated model; it precedes vLLM's model class among the bases."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        model: Any = self
        self._place = vllm_config.model_config.model, vllm_config.model_config.revision
        self._dtype = vllm_config.model_config.dtype
        config: DualHeadConfig = read_config(*self._place)["dual_head"]
        lm_layer = getattr(model, "lm_head", None) or model.model.embed_tokens
        self._hidden_size = config.hidden_size
        count = vllm_config.model_config.hf_text_config.num_hidden_layers
        self.dual_head = ServedHead(config, lm_layer, count)
        device = lm_layer.weight.device
        self.requests = RequestTable.of(vllm_config, config.num_objectives, device)

    @staticmethod
    def get_model_state_cls() -> type:
        """The class of the model state, for vLLM's second model runner."""
        from .model_state_v2 import GatedModelState

        return GatedModelState

    def forward(self, *args: Any, control_rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Hidden states, the gate's logit and the request's controls of each position, side by
        side: (T, d + ...). The numbers keep their 32 bits in the model's dtype.

        Args:
            control_rows: (T, width) from the second model runner; the first one's batch is found
                through the attention's metadata.
        """
        hidden = super().forward(*args, **kwargs)
        if control_rows is None:
            control_rows = self.requests.of_positions(_query_start_loc(), len(hidden))
        logit = self.dual_head.gate_logits(hidden)
        numbers = torch.cat([logit.float()[:, None], control_rows], 1)
        return torch.cat([hidden, numbers.view(hidden.dtype)], 1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The mixture's logits after the backbone's f, (N, V) fp32, of rows of :meth:`forward`."""
        logits = self.compute_logits_local(hidden_states)
        processor = self.logits_processor
        if self.dual_head._parallel:
            whole = processor.use_all_gather
            gather = tensor_model_parallel_all_gather if whole else tensor_model_parallel_gather
            logits = gather(logits)
        return None if logits is None else logits[..., : processor.org_vocab_size]

    def compute_logits_local(self, hidden_states: Tensor) -> Tensor:
        """The same for this process's rows of the vocabulary."""
        hidden = hidden_states[:, : self._hidden_size].contiguous()
        numbers = hidden_states[:, self._hidden_size :].contiguous().view(torch.float32)
        controls = self.requests.controls(numbers[:, 1:])
        out = self.dual_head.served_logits(hidden, numbers[:, 0], controls)
        self.requests.note(out.alpha)
        return self.dual_head.padded(out.logits)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """The argmax of :meth:`compute_logits`; the backbone's method would ignore the heads."""
        raise NotImplementedError("vLLM: a gated model cannot draft for speculative decoding")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The backbone's weights, and the heads from their own files."""
        loaded = super().load_weights(weights)
        stored, state = read_head_folder(*self._place)
        check_head_state(stored["dual_head"], state, stored["quantized"], f"vLLM: {self._place[0]}")
        device = self.dual_head._lm_layer.weight.device
        self.dual_head.load(state, self._dtype, device)
        return loaded | {n for n, _ in self.named_parameters() if n.startswith("dual_head.")}


def _query_start_loc() -> Tensor | None:
    """The first position of each request in this batch; None in a run without requests."""
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return None
    if not isinstance(metadata, dict):
        raise NotImplementedError("vLLM: the gated head does not run in micro-batches")
    for layer in metadata.values():
        if (found := getattr(layer, "query_start_loc", None)) is not None:
            return found
    raise NotImplementedError(
        "vLLM: this attention backend does not say where a request begins, which the gated head "
        "needs; choose another by --attention-backend, for example FLASH_ATTN"
    )


@functools.cache
def _gated(name: str, base: type[nn.Module]) -> type[nn.Module]:
    return type(name, (Gated, base), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    plain = {ours: theirs for ours, theirs in ARCHITECTURES.values()}
    if name not in plain:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _gated(name, ModelRegistry.models[plain[name]].load_model_cls())
