# SPDX-License-Identifier: Apache-2.0
"""Registers the gated models with vLLM: their classes and the settings of their engine."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ..model.served_folder import ARCHITECTURES

_ROOM = __name__.rpartition(".")[0]


def register_models() -> None:
    """Register the class, imported when needed, and the settings of each gated architecture."""
    for name, _ in ARCHITECTURES.values():
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{_ROOM}.models:{name}")
        MODELS_CONFIG_MAP[name] = GatedSettings


class GatedSettings(VerifyAndUpdateConfig):
    """The settings of an engine for a gated model."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set up the engine for controls and ``return_alpha`` of requests.

        Raises:
            NotImplementedError: a feature that is not supported with a gated head.
            ValueError: the heads' files are damaged or quantised.
        """
        from ..model.head_folder import read_config

        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        unsupported = {
            "speculative decoding": vllm_config.speculative_config is not None,
            "LoRA": vllm_config.lora_config is not None,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "micro-batches": parallel.enable_dbo,
            "prompt embeddings": model.enable_prompt_embeds,
            "load_format dummy": vllm_config.load_config.load_format == "dummy",
            "an LM head of another dtype": model.head_dtype != model.dtype,
        }
        for feature, asked in unsupported.items():
            if asked:
                raise NotImplementedError(f"vLLM: {feature} is not supported with a gated head")
        stored = read_config(model.model, model.revision)
        if stored["quantized"] is not None:
            raise ValueError(
                f"vLLM: {model.model} holds heads in {stored['quantized']}; export them in full "
                "precision"
            )
        runner = 2 if vllm_config.use_v2_model_runner else 1
        count = stored["dual_head"].num_objectives
        controls = f"{_ROOM}.controls_v{runner}:RequestControls{count}"
        model.logits_processors = [*(model.logits_processors or ()), controls]
        if not parallel.worker_extension_cls:
            parallel.worker_extension_cls = f"{_ROOM}.alpha.AlphaOfWorker"
