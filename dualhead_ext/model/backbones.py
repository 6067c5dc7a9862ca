# SPDX-License-Identifier: Apache-2.0
"""What backbones do that the gated head has to know: how they post-process logits, and which inputs
pack several sequences into one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Arguments of serving engines and of packed (padding-free) batches: the gate would look across the
# sequences in them and give wrong tokens without a word.
_PACKED_ARGUMENTS = (
    "block_table",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "seq_idx",
    "cache",
)


def backbone_post_processing(config: Any) -> dict[str, float]:
    """``logit_scale`` and ``logit_softcap`` of a backbone's own f(z) = cap(scale z), read from its
    config.
    """
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
    """Raise NotImplementedError for packed input, also of a batching manager that is not the gated
    model's own, naming it.
    """
    for name in _PACKED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"DualHeadForCausalLM: {name} belongs to packed input, which the gated head does "
                "not decode; pad the batch, or use the model's own generate_batch"
            )
    positions = kwargs.get("position_ids")
    alone = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
    if (
        positions is not None
        and alone
        and positions.dim() == 2
        and not torch.compiler.is_compiling()
    ):
        if (positions.diff(dim=-1) < 0).any():
            raise NotImplementedError(
                "DualHeadForCausalLM: position_ids that start again within a row are packed "
                "input, which the gated "
                "head does not support; pad the batch instead"
            )


def refuse_bypass(forward: Any) -> None:
    """Raise NotImplementedError for a forward that TRL or Liger puts in a model's place: it
    multiplies hidden states by ``lm_head.weight`` itself, so that no gate mixes and no head learns.
    """
    function = getattr(forward, "__func__", forward)
    source = getattr(function, "__globals__", {}).get("__name__", "")
    if source.partition(".")[0] in ("trl", "liger_kernel"):
        raise NotImplementedError(
            f"DualHeadForCausalLM: {source} computes its loss from lm_head.weight alone and would "
            "pass the gate and the reward head by; train heads with dualhead_ext.DualHeadTrainer, "
            "or the plain backbone after dualhead_ext.detach(model)"
        )


def class_name(thing: Any) -> str:
    """A class's name with the package it is from: "peft Linear"."""
    kind = type(thing)
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"


def decoder_of(model: nn.Module, found: nn.Module) -> nn.Module:
    """What transformers' ``get_decoder`` has ``found``, or ``model.model`` where that is the model
    itself (Llama 4's text model names another attribute as its base).
    """
    inner = getattr(model, "model", None)
    return inner if found is model and isinstance(inner, nn.Module) else found


def inside_peft(model: Any) -> Any:
    """The model inside PEFT's wrapper, adapters in its layers; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Where ``module`` is in the model's tree of modules."""
    for name, found in model.named_modules():
        if found is module:
            return name
    raise ValueError(f"{type(model).__name__}: its output embeddings are not one of its modules")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``old`` is in the model's tree of modules."""
    parent, _, attribute = module_name(model, old).rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
