# SPDX-License-Identifier: Apache-2.0
"""Properties of backbones that the gated head depends on: their post-processing of logits, their
packed inputs, their modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .hf_cache import cache_in

# Arguments of serving engines and of packed (padding-free) batches. The gate would attend across
# their sequences and silently choose wrong tokens.
_PACKED_ARGUMENTS = (
    "block_table",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "seq_idx",
)


def backbone_post_processing(config: Any) -> dict[str, float]:
    """``logit_scale`` and ``logit_softcap`` of the backbone's f(z) = cap(scale z), from config."""
    config = config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)
        if scaling is not None:  # Granite divides; HyperCLOVA X multiplies by the same name
            scale = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(
        config, "logits_soft_cap", None
    )  # RecurrentGemma's name
    return {
        "logit_scale": scale,
        "logit_softcap": float(cap or 0.0),
    }


def refuse_packed(kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for packed input, also from a batching manager that is not the
    gated model's own.
    """
    for name in (*_PACKED_ARGUMENTS, "cache"):
        given = kwargs.get(name)
        # Since transformers 5.24 any cache comes by that name, and not only a batching manager's.
        if given is not None and not isinstance(given, Cache):
            raise NotImplementedError(
                f"DualHeadForCausalLM: {name} belongs to packed input, which the gated head does "
                "not decode; pad the batch, or use the model's own generate_batch"
            )
    positions = kwargs.get("position_ids")
    alone = kwargs.get("attention_mask") is None and cache_in(kwargs) is None
    if (
        positions is not None
        and alone
        and positions.dim() == 2
        and not torch.compiler.is_compiling()
    ):
        if (positions.diff(dim=-1) < 0).any():
            raise NotImplementedError(
                "DualHeadForCausalLM: position_ids that restart within a row are packed input, "
                "which the gated head does not support; pad the batch instead"
            )


def refuse_bypass(forward: Any) -> None:
    """Raise NotImplementedError for a forward from TRL or Liger. It multiplies hidden states by
    ``lm_head.weight`` itself, so the gate would not mix and the heads would not learn.
    """
    function = getattr(forward, "__func__", forward)
    source = getattr(function, "__globals__", {}).get("__name__", "")
    if source.partition(".")[0] in ("trl", "liger_kernel"):
        raise NotImplementedError(
            f"DualHeadForCausalLM: {source} computes its loss from lm_head.weight alone and would "
            "bypass the gate and the reward head; train heads with dualhead_ext.DualHeadTrainer, "
            "or the plain backbone after dualhead_ext.detach(model)"
        )


def class_name(thing: Any) -> str:
    """The class name of an object after its package: "peft Linear"."""
    kind = type(thing)
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"


def decoder_of(model: nn.Module, found: nn.Module) -> nn.Module:
    """``found``, the result of transformers' ``get_decoder``; or ``model.model`` if ``found`` is
    the model itself (Llama 4's text model names another attribute as its base).
    """
    inner = getattr(model, "model", None)
    return inner if found is model and isinstance(inner, nn.Module) else found


def inside_peft(model: Any) -> Any:
    """The model inside PEFT's wrapper, with adapters in its layers; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def module_name(model: nn.Module, module: nn.Module) -> str:
    """The dotted name of ``module`` in the model."""
    for name, found in model.named_modules():
        if found is module:
            return name
    raise ValueError(f"{type(model).__name__}: its output embeddings are not one of its modules")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the module ``old`` of the model by ``new``."""
    parent, _, attribute = module_name(model, old).rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def refuse_offloaded(head: nn.Module, operator: str, model: str) -> None:
    """Refuse an LM head whose weights accelerate keeps elsewhere.

    Raises:
        NotImplementedError: the head is on the meta device, and a hook of accelerate fetches it.
    """
    if head.weight.device.type == "meta" and hasattr(head, "_hf_hook"):
        raise NotImplementedError(
            f"{operator}: the weight of {model}'s lm_head is offloaded; the heads need it in "
            "memory: give lm_head (and an embedding tied to it) a device in device_map, instead "
            'of cpu_offload, disk_offload or "disk"'
        )
