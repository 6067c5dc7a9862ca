# SPDX-License-Identifier: Apache-2.0
"""`generate()` of a gated model: the controls of each request, and alpha of each token."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..head.calibration import strength_of_kl
from ..head.controls import objective_rows, per_row
from .backbones import refuse_packed
from .fused_loop import FusedDecodingMixin, decoding_of
from .hf_cache import StaticGateLayer

logger = logging.getLogger(__name__)

CONTROLS = ("strength", "gate_offset", "alpha", "max_kl", "skip_threshold", "objective_weights")


class GatedGenerationMixin(FusedDecodingMixin):
    """Hugging Face's ``generate``, with numbers per request that reach every forward."""

    def prepare_inputs_for_generation(
        self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        """As the backbone's, and which of the new positions are real tokens: a static cache's mask
        is 4-D by then.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        new = embeds if ids is None else ids
        if attention_mask is not None and attention_mask.dim() == 2:
            # Cloned, as transformers does with ids: a slice's stride would grow with the mask and
            # recompile each step.
            valid = attention_mask[:, -new.shape[1] :].bool()
            inputs["dualhead_valid"] = valid.clone(memory_format=torch.contiguous_format)
        elif attention_mask is None and inputs.get("attention_mask") is not None:
            # It drops a mask of ones, and makes a static cache's own without it.
            shape = new.shape[:2]
            inputs["dualhead_valid"] = torch.ones(shape, dtype=torch.bool, device=new.device)
        return inputs

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Cache:
        cache = super()._prepare_static_cache(*args, **kwargs)
        bound = inspect.signature(super()._prepare_static_cache).bind(*args, **kwargs).arguments
        # Sliding layers report their window as their length: the gate needs the whole of it.
        head, length = self.lm_head_module, self._previous_max_cache_length
        cache.layers.append(StaticGateLayer(head.new_cache(bound["batch_size"], length)))
        return cache

    def generate(
        self, inputs: Tensor | None = None, *args: Any, output_gate: bool = False, **kwargs: Any
    ) -> Any:
        """Hugging Face's own ``generate``, every option of it, and per request:

        Args:
            strength, gate_offset, alpha: a number, or one per request (B,); see
                ``DualHead.forward``.
            kl: likewise, instead of a strength: nats per token that the text is to be away from the
                backbone, by the curve that calibration measured at uniform objective weights.
            max_kl: likewise; lowers alpha at each token until KL(pi_mix || pi_LM) is within it.
                Steps are then computed by eager PyTorch.
            skip_threshold: likewise, in [0, 0.5]; alpha nearer than that to 0 or 1 counts as such,
                and a step in which it does for all requests reads one head (docs/generation.md).
            objective_weights: (K,) or (B, K).
            fused: whether tokens are chosen by the fused step, without logits (see
                :mod:`dualhead_ext.model.fused_loop`). None: where the options allow it; False:
                never;
                True: always, or ValueError naming the option that is in the way.
            seeds: (B,) int64, of sampled requests; generator: draws them where they are not given
                (default: torch's global one). For the fused loop alone.
            output_gate: with ``return_dict_in_generate=True``, adds ``out.gate_alpha`` (B, new
                tokens): alpha at each position that chose a token, from one more pass over the
                finished sequences.
        Raises:
            ValueError, TypeError: controls. NotImplementedError: packed inputs.
        """
        refuse_packed(kwargs)
        given = (
            inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        )
        batch = 1 if given is None else given.shape[0]
        if (kl := kwargs.pop("kl", None)) is not None:
            kwargs["strength"] = self._strength_of(kl, kwargs)
        decoding = decoding_of(kwargs, batch, self.generation_config)
        kwargs |= {} if decoding is None else {"dualhead_decoding": decoding}
        for name in CONTROLS[:-1]:
            row = per_row(
                "generate", name, kwargs.pop(name, None), batch, torch.float32, self.device
            )
            kwargs |= {} if row is None else {name: row}
        weights = kwargs.pop("objective_weights", None)
        count = self.dual_head_config.num_objectives
        rows = objective_rows("generate", weights, batch, count, torch.float32, self.device)
        kwargs |= {} if rows is None else {"objective_weights": rows}
        controls = {name: kwargs[name] for name in CONTROLS if name in kwargs}
        out = super().generate(inputs, *args, **kwargs)
        if output_gate:
            if isinstance(out, Tensor):
                raise ValueError("generate: output_gate=True needs return_dict_in_generate=True")
            out["gate_alpha"] = self._alpha_of(out.sequences, given, kwargs, controls)
        return out

    def _strength_of(self, kl: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("strength") is not None:
            raise ValueError("generate: kl and strength are two ways to say one thing; give one")
        weights = kwargs.get("objective_weights")
        if weights is not None:
            weights = torch.as_tensor(weights, dtype=torch.float64)
            if not torch.allclose(weights, torch.full_like(weights, 1 / weights.shape[-1])):
                logger.warning(
                    "generate: kl: the curve was measured at uniform objective weights; at others "
                    "the KL will differ from what was asked"
                )
        return strength_of_kl(self.dual_head_config.kl_curve, kl)

    @torch.no_grad()
    def _alpha_of(
        self, sequences: Tensor, prompt: Tensor | None, kwargs: dict, controls: dict
    ) -> Tensor:
        """alpha at every position that chose a token of ``sequences``: (B, new tokens)."""
        repeats = 1 if prompt is None else sequences.shape[0] // prompt.shape[0]
        repeated = {name: row.repeat_interleave(repeats, 0) for name, row in controls.items()}
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if embeds is not None:
            embeds = embeds.repeat_interleave(repeats, 0)
            rest = self.get_input_embeddings()(sequences.to(embeds.device))
            inputs: dict[str, Any] = {"inputs_embeds": torch.cat((embeds, rest), 1)}
            start, total = embeds.shape[1], embeds.shape[1] + sequences.shape[1]
        else:
            start, total = (1 if prompt is None else prompt.shape[1]), sequences.shape[1]
            inputs = {"input_ids": sequences}
        if mask is not None:
            mask = mask.repeat_interleave(repeats, 0)
            ones = mask.new_ones(mask.shape[0], total - mask.shape[1])
            inputs["attention_mask"] = torch.cat((mask, ones), 1)
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            if "position_ids" in inspect.signature(self.forward).parameters:
                inputs["position_ids"] = positions
        keep = torch.arange(start - 1, total - 1, device=sequences.device)
        self(**inputs, **repeated, use_cache=False, logits_to_keep=keep)
        return self.lm_head_module.last_alpha

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs requests into one sequence, across which the gate
        would look.
        """
        raise NotImplementedError(
            "generate_batch: continuous batching is not supported by the gated head; use generate"
        )
