# SPDX-License-Identifier: Apache-2.0
"""Gate and reward head on vLLM's layers, with the formulas of `GatedHead`. A full reward head is
stored in vLLM's parallel LM heads, split by rows of the vocabulary over processes; everything
smaller is replicated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ..config import DualHeadConfig
from ..head import decoding, mixture
from ..head.controls import Controls
from ..head.dual_head import DualHeadOutput, GatedHead
from ..head.gate import GATES, Gate
from ..head.request_controls import with_own_alpha
from ..head.reward_head import make_reward_head
from ..ops.logits import postprocess
from .gate_cache import GateAttention


class _FullRewardHead(nn.Module):
    """K parallel LM heads."""

    kind = "full"

    def __init__(self, config: DualHeadConfig, prefix: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.reward_head.{k}"
            )
            for k in range(config.num_objectives)
        )


class ServedHead(GatedHead):
    """The gated head of a model in vLLM; its logits cover this process's rows of the vocabulary.

    Weights are set by :meth:`load`; before that, only the LM head is used.
    """

    def __init__(
        self, config: DualHeadConfig, lm_layer: Any, num_layers: int, prefix: str = "dual_head"
    ) -> None:
        """lm_layer: vLLM's LM head, possibly the embedding. num_layers: the backbone's layers."""
        nn.Module.__init__(self)
        self._lm = [lm_layer]  # in a list, so that it is not registered as a submodule
        self._vocab = config.vocab_size
        self._rows = slice(
            lm_layer.shard_indices.org_vocab_start_index, lm_layer.shard_indices.org_vocab_end_index
        )
        self._width = lm_layer.num_embeddings_per_partition
        self._parallel = get_tensor_model_parallel_world_size() > 1
        self.config = replace(config, vocab_size=self._rows.stop - self._rows.start)
        self.attention = None
        kind = GATES[config.gate]
        if kind.has_state:
            name = f"dualhead.{num_layers}.gate"  # vLLM reads the layer's number from it
            self.attention = GateAttention(config.gate_num_heads, config.gate_head_dim, name)
        if config.reward_head == "full":
            self.reward_head: Any = _FullRewardHead(config, prefix)

    @property
    def _lm_layer(self) -> Any:
        return self._lm[0]

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        """Load and check the tensors of a heads file; dtype and device are the model's."""
        parts: dict[str, dict[str, Tensor]] = {"gate": {}, "reward_head": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        with torch.device(device):
            gate = GATES[self.config.gate](self.config).float()
        gate.load_state_dict(parts["gate"])
        if gate.has_state:
            self.u_weight = gate.folded_values()  # computed from the trained weights
            self.qk_weight = torch.cat([gate.q_weight, gate.k_weight]).to(dtype)  # one product
            for name in ("q_weight", "k_weight", "v_weight", "o_weight", "out_weight"):
                delattr(gate, name)
        self.gate: Gate = gate.requires_grad_(False)
        reward = parts["reward_head"]
        if self.config.reward_head == "full":
            for k, layer in enumerate(self.reward_head.layers):
                layer.weight_loader(layer.weight, reward["weight"][k])
            return
        if self.config.reward_head == "lowrank":
            reward |= {"bias": reward["bias"][:, self._rows]}
            reward |= {"up.weight": reward["up.weight"][:, self._rows]}
        with torch.device(device):
            head = make_reward_head(self.config).float()
        head.load_state_dict(reward)
        for maps in head.maps:
            if maps is not None:
                maps.data = maps.to(dtype)
        self.reward_head = head.requires_grad_(False)

    # --- the gate ---

    def gate_logits(self, hidden: Tensor) -> Tensor:
        """Gate logits (T,) fp32 of hidden (T, d); their state is written to the cache."""
        if self.attention is None:
            return self.gate(hidden)
        qk = nn.functional.linear(hidden, self.qk_weight)
        u = nn.functional.linear(hidden.float(), self.u_weight)
        return self.attention(qk, u) + self.gate.out_bias

    # --- the two heads ---

    def lm_logits(self, hidden: Tensor, bias: bool = True) -> Tensor:
        """As `GatedHead`, of this process's rows."""
        return self._product(self._lm_layer, hidden)

    def reward_logits(self, hidden: Tensor, z_lm: Tensor, weights: Tensor | None) -> Tensor:
        """As `GatedHead`, of this process's rows."""
        if self.reward_head.kind != "full":
            return super().reward_logits(hidden, z_lm, weights)
        layers = self.reward_head.layers
        products = (self._product(layer, hidden) for layer in layers)
        return mixture.weighted_sum(products, len(layers), weights)

    def _product(self, layer: Any, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = layer.quant_method.apply(layer, rows)[:, : self.config.vocab_size]
        return logits.float().view(*hidden.shape[:-1], -1)

    # --- what needs the other processes' rows ---

    def _limited(
        self, limit_alpha: decoding.LimitAlpha, z_lm: Tensor, z_rm: Tensor, alpha: Tensor
    ) -> Tensor:
        if self._parallel:
            z_lm, z_rm = self._whole(z_lm), self._whole(z_rm)
        return limit_alpha(z_lm, z_rm, alpha)

    def _mix(self, z_lm: Tensor, z_rm: Tensor, alpha: Tensor, *post: float) -> Tensor:
        if not self._parallel or self.config.mix == "logits":
            return super()._mix(z_lm, z_rm, alpha, *post)
        z_lm, z_rm = (_with_the_rest(postprocess(z, *post)) for z in (z_lm, z_rm))
        return mixture.mix_logits(z_lm, z_rm, alpha, self.config.mix)[..., :-1]

    def padded(self, logits: Tensor) -> Tensor:
        """Pad rows to the width of every process; columns beyond the vocabulary are cut later. The
        result is contiguous, as a gather needs it.
        """
        missing = self._width - logits.shape[-1]
        return nn.functional.pad(logits, (0, missing)) if missing else logits.contiguous()

    def _whole(self, logits: Tensor) -> Tensor:
        return tensor_model_parallel_all_gather(self.padded(logits))[..., : self._vocab]

    def served_logits(self, hidden: Tensor, gate_logit: Tensor, controls: Controls) -> Any:
        """`GatedHead.mixed` of hidden (N, d), gate_logit (N,) and rows of controls, alpha NaN where
        a request leaves it to the gate.
        """
        gate_logit = gate_logit[:, None]
        out = self.mixed(hidden[:, None], gate_logit, with_own_alpha(controls, gate_logit))
        return DualHeadOutput(out.logits[:, 0], out.alpha[:, 0], out.gate_logit[:, 0])


def _with_the_rest(logits: Tensor) -> Tensor:
    """Append a column with the log-sum-exp of the other processes' rows, so that a softmax over the
    result is one over the whole vocabulary.
    """
    sums = tensor_model_parallel_all_gather(torch.logsumexp(logits, -1, keepdim=True))
    sums[..., get_tensor_model_parallel_rank()] = -torch.inf
    return torch.cat([logits, torch.logsumexp(sums, -1, keepdim=True)], -1)
