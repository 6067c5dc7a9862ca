# SPDX-License-Identifier: Apache-2.0
"""A trial of a backbone when heads are attached: six tokens in one pass, and again with a cache.

The heads rely on how the backbone calls its lm_head: once per forward, with the decoder's last
hidden states, and with past positions in a transformers Cache. Any other backbone would silently
write wrong text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..ops.logits import postprocess
from ..quantization.torchao_weights import is_torchao
from .hf_cache import cache_argument, cache_of, gate_layer

# Relative: bf16 rounding changes logits by about 1 %, another input by about 100 %.
_TOLERANCE = 0.05
_TOKENS = 6


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    a, b = a.float(), b.float()
    # Equal infinities count as equal. So do NaNs: a broken backbone is not the heads' fault, and
    # training and decoding report it.
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, a - b)
    return not bool(apart.norm() <= _TOLERANCE * torch.where(b.isfinite(), b, 0.0).norm())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients; restores the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tokens(model: PreTrainedModel) -> Tensor:
    embeddings: Any = model.get_input_embeddings()
    weight: Tensor = embeddings.weight
    device = weight.device
    device = torch.device("cpu") if device.type == "meta" else device  # offloaded: moved by hooks
    count = weight.shape[0]
    # Skip the padding and special tokens at the beginning of the vocabulary, if it is large enough.
    ids = torch.arange(_TOKENS, device=device) + max(0, min(5, count - _TOKENS))
    return (ids % count)[None]


def can_be_tried(model: PreTrainedModel, linear: nn.Linear) -> bool:
    """Whether the model can compute: not on the meta device, and not with torchao weights in its
    lm_head, which can be read only after attaching.
    """
    if is_torchao(linear.weight):
        return False
    offloaded = hasattr(model, "_hf_hook") or getattr(model, "hf_device_map", None) is not None
    return offloaded or all(p.device.type != "meta" for p in model.parameters())


def plain_logits(model: PreTrainedModel, operator: str) -> Tensor:
    """Logits (1, 6, V) of the plain backbone.

    Raises:
        NotImplementedError: its forward fails on six tokens.
    """
    with _evaluating(model):
        ids = _tokens(model)
        try:
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        except Exception as error:
            raise _refused(
                model, operator, f"its own forward fails on {_TOKENS} tokens ({error})"
            ) from error


def _refused(model: nn.Module, operator: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"{operator}: {type(model).__name__} cannot carry the gated head: {reason}. "
        "trial=False attaches it unchecked"
    )


def try_backbone(model: Any, expected: Tensor, operator: str) -> None:
    """Compare a model with newly attached heads with its backbone's logits ``expected`` (1, 6, V),
    and a cached step with a full pass. Sets ``scaled_input`` and ``knows_f`` of the head.

    Raises:
        NotImplementedError: the results differ; the message says why.
    """
    head = model.lm_head_module
    with _evaluating(model):
        ids = _tokens(model)
        mask = torch.ones_like(ids)
        seen: list[tuple[Tensor | None, Tensor]] = []

        def note(module: Any, arguments: tuple) -> None:
            call = module._calls.get(module._thread())
            seen.append((None if call is None else call.hidden, arguments[0]))

        spy = head.register_forward_pre_hook(note)
        try:
            _check_full_pass(model, head, ids, mask, expected, seen, operator)
            _check_cached_step(model, head, ids, mask, seen, operator)
        except NotImplementedError:
            raise
        except Exception as error:
            raise _refused(model, operator, f"{type(error).__name__}: {error}") from error
        finally:
            spy.remove()
            head.last_alpha = None


def _check_full_pass(
    model: Any, head: Any, ids: Tensor, mask: Tensor, expected: Tensor, seen: list, operator: str
) -> None:
    try:
        model(input_ids=ids, attention_mask=mask, strength=0.0)
    except RuntimeError as error:
        if not seen or seen[-1][0] is not None:
            raise
        raise _refused(
            model, operator, f"{type(model.get_decoder()).__name__} is not its decoder"
        ) from error
    if len(seen) != 1:
        raise _refused(model, operator, f"it calls its lm_head {len(seen)} times in a forward")
    hidden, read = seen[0]
    config = head.config
    if hidden is None or hidden.shape != read.shape or not hidden.is_floating_point():
        raise _refused(
            model, operator, "its lm_head does not read the decoder's last hidden states"
        )
    head.scaled_input = config.logit_scale != 1.0 and not _differ(read, hidden * config.logit_scale)
    if not head.scaled_input and _differ(read, hidden):
        raise _refused(
            model,
            operator,
            "something between its decoder and its lm_head changes the hidden states, which the "
            "gate and the fused step read as the decoder gives them",
        )
    z = head.lm_logits(hidden.to(head.weight.dtype))
    z = postprocess(z, config.logit_scale, config.logit_softcap)
    head.knows_f = not _differ(z, expected)
    if config.mix == "probs" and not head.knows_f:
        raise _refused(
            model,
            operator,
            "it changes its logits in a way that its config does not say (logit_scale, "
            'logit_softcap), which mix="probs" must know; decoding with mix="logits" works',
        )
    seen.clear()
    logits = model(input_ids=ids, attention_mask=mask, strength=0.0).logits
    wanted = torch.log_softmax(expected.float(), -1) if config.mix == "probs" else expected
    if _differ(logits, wanted):
        raise _refused(model, operator, "at strength 0 its logits are not the backbone's")


def _check_cached_step(
    model: Any, head: Any, ids: Tensor, mask: Tensor, seen: list, operator: str
) -> None:
    name = cache_argument(model)
    if name is None:
        raise _refused(
            model, operator, "its forward takes no cache, which the gate needs for past positions"
        )
    full = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    given = {}
    if model._supports_default_dynamic_cache():
        given = {name: DynamicCache(config=model.config)}  # as generate() does
    past = _TOKENS - 1
    out = model(input_ids=ids[:, :past], attention_mask=mask[:, :past], use_cache=True, **given)
    cache = cache_of(out)
    cache = given.get(name) if cache is None else cache
    layer = gate_layer(cache) if isinstance(cache, Cache) else None
    if layer is None or layer.gate_cache.columns != past:
        raise _refused(
            model,
            operator,
            f"it keeps past positions in {type(cache).__name__}, not in a transformers Cache that "
            "the gate can share",
        )
    step = model(input_ids=ids[:, past:], attention_mask=mask, use_cache=True, **{name: cache})
    if layer.gate_cache.columns != _TOKENS:
        raise _refused(model, operator, "a cached step does not write to the gate's cache")
    if _differ(step.logits[:, -1], full):
        raise _refused(
            model, operator, "a step with a cache gives other logits than one pass over all tokens"
        )
