# SPDX-License-Identifier: Apache-2.0
"""Attaching a gated head to a backbone, and detaching it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel

from ..config import DualHeadConfig
from .backbone_trial import can_be_tried, plain_logits, try_backbone
from .backbones import refuse_offloaded, replace_module
from .lm_head import DualHeadLMHead


@functools.cache
def extended_class(
    extension: type, base: type[PreTrainedModel], arguments: tuple[str, ...]
) -> type[PreTrainedModel]:
    """A class that derives from ``extension`` and ``base``, with ``arguments`` added to its
    forward. It has the name of ``base``, by which pipelines and saved configs find it.
    """
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    names = tuple(p.name for p in parameters[1:] if p.kind is not p.VAR_KEYWORD)

    # generate() and Trainer inspect the signature. Without that of the base, GPT-2 would silently
    # lose its position_ids.
    def extended_forward(self, *args, **kwargs):
        return self._dual_head_forward(base.forward, names, args, kwargs)

    forward: Any = functools.wraps(base.forward)(extended_forward)

    # accelerate's unwrap_model() follows __wrapped__ and would restore the backbone's forward.
    del forward.__wrapped__
    added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in arguments]
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    forward.__signature__ = signature.replace(
        parameters=[p for p in parameters if p.kind is not p.VAR_KEYWORD] + added + rest
    )
    return type(
        base.__name__,
        (extension, base),
        {"forward": forward, "__module__": base.__module__},
    )


def attach(
    model: PreTrainedModel,
    linear: nn.Linear,
    config: DualHeadConfig,
    extended: type,
    operator: str,
    trial: bool,
) -> Any:
    """Replace ``linear`` by a gated head, and give ``model`` the class ``extended``.

    Raises:
        NotImplementedError: the trial (:mod:`dualhead_ext.model.backbone_trial`) failed, or the LM
            head is not in memory. The model stays as it was.
    """
    refuse_offloaded(linear, operator, type(model).__name__)
    if not (trial and can_be_tried(model, linear)):
        return _attach(model, linear, config, extended)
    expected = plain_logits(model, operator)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _attach(model, linear, config, extended)
    try:
        try_backbone(model, expected, operator)
    except NotImplementedError:
        _take_out(model, linear)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
    return model


def _attach(
    model: PreTrainedModel, linear: nn.Linear, config: DualHeadConfig, extended: type
) -> Any:
    model.requires_grad_(False)
    head = DualHeadLMHead(linear, config)
    head.train(linear.training)
    # post_init() initialises modules without this mark: the LM head would become random.
    for module in head.modules():
        vars(module)["_is_hf_initialized"] = True
    with _without_accelerates_forward(model):
        replace_module(model, linear, head)
        if hasattr(linear, "_hf_hook"):
            add_hook_to_module(head, linear._hf_hook)
        model.__class__ = extended
    decoder = model.get_decoder()
    head.decoder_hook = decoder.register_forward_hook(head.on_decoder, with_kwargs=True)
    return model


def detach(model: PreTrainedModel, dequantize: bool = False) -> PreTrainedModel:
    """Restore the plain backbone in place: its class and its lm_head.

    If the LM head is quantised and was tied to the embedding, it becomes the embedding's weight
    again. If it was not tied, its full-precision weights are gone.

    Args:
        model: a model with a gated head.
        dequantize: in that case, True gives the lm_head the dequantised weights; False (default)
            raises RuntimeError.
    Returns: the same object.
    Raises:
        TypeError: the model has no gated head. RuntimeError: see dequantize; the model stays as it
            was.
    """
    if not hasattr(model, "lm_head_module"):
        raise TypeError(f"detach: model must have a gated head, got {type(model).__name__}")
    gated: Any = model
    head, weight = gated.lm_head_module, gated._plain_lm_weight()
    if weight is None:
        if not dequantize:
            raise RuntimeError(
                f"detach: the LM head is quantised ({head.quantized}) and its full precision is "
                "gone: load the backbone again, or pass dequantize=True for an lm_head with "
                "the dequantised weights"
            )
        weight = nn.Parameter(head.dequantized(), requires_grad=False)
    linear = nn.Linear(
        head.in_features, head.out_features, bias=head.bias is not None, device="meta"
    )
    linear.weight = weight
    if head.bias is not None:
        linear.bias = head.bias
    linear.train(head.training)
    if not hasattr(model, "_hf_hook"):
        # accelerate's mixed precision and unwrapping store the gated forward in the instance.
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
    _take_out(model, linear)
    return model


def _take_out(model: Any, linear: nn.Linear) -> None:
    head = model.lm_head_module
    head.decoder_hook.remove()
    with _without_accelerates_forward(model):
        replace_module(model, head, linear)
        if hasattr(head, "_hf_hook") and not hasattr(linear, "_hf_hook"):
            add_hook_to_module(linear, head._hf_hook)
        model.__class__ = type(model).__bases__[1]


@contextmanager
def _without_accelerates_forward(model: nn.Module) -> Iterator[None]:
    """accelerate's hook of a dispatched model stores the class's forward in the instance, where it
    would hide the forward of a new class. So the hook is removed, and added again afterwards.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is None:
        yield
        return
    remove_hook_from_module(model)
    model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        add_hook_to_module(model, hook)
