# SPDX-License-Identifier: Apache-2.0
"""The tensors of a gated head in files: their names, shapes and dtypes; loading and checking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config import DualHeadConfig
from ..files.foreign import shown
from ..head.dual_head import DualHead
from ..quantization import FORMATS, format_of, storage_shapes
from .shards import copy_whole

_PIECE = 2**24  # elements checked at a time


def head_state(head: Any, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a gated head for a file, by their names there: gate.*, reward_head.*, and
    lm_head.* if it is trained or quantised.

    Args:
        given: a state dict of the head to use instead of the current one.
    Raises:
        ValueError: ``given`` lacks a tensor; the message names it.
    """
    own = head.state_dict()
    names = {name: name for name in own if "." in name}
    if head.owns_lm_head:
        parts = ("weight", "bias", "weight_scale")
        names |= {f"lm_head.{name}": name for name in parts if name in own}
    source = own if given is None else given
    if any(isinstance(source.get(name), DTensor) for name in names.values()):
        raise ValueError(
            "the heads are sharded over processes; save them by the trainer's save_model, on all "
            "of them"
        )
    if missing := sorted(name for name in names.values() if name not in source):
        raise ValueError(f"state_dict must hold the heads' tensors, {shown(missing)} are missing")
    return {name: source[n].detach().cpu().contiguous() for name, n in names.items()}


def check_head_state(
    config: DualHeadConfig, state: dict[str, Tensor], quantized: str | None, where: str
) -> None:
    """Raise ValueError unless ``state`` is exactly the state of a head of ``config`` in the format
    ``quantized`` (None: full precision): the names, shapes and dtypes are right, and all values are
    finite.
    """
    try:
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in DualHead(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise ValueError(f"{where}: no head can have these sizes: {config}") from error
    if quantized is not None:
        for head in _quantized_heads(config):
            names = f"{head}.weight", f"{head}.weight_scale"
            shapes |= zip(names, storage_shapes(quantized, shapes[names[0]]), strict=True)
    elif not any(name.startswith("lm_head.") for name in state):
        shapes = {n: shape for n, shape in shapes.items() if not n.startswith("lm_head.")}
    missing, unknown = sorted(set(shapes) - set(state)), sorted(set(state) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"{where}: the heads' tensors must be {', '.join(sorted(shapes))}; missing: "
            f"{shown(missing) or 'none'}; unknown: {shown(unknown) or 'none'}"
        )
    for name, value in state.items():
        if value.shape != shapes[name]:
            raise ValueError(
                f"{where}: {name} must be {tuple(shapes[name])}, got {tuple(value.shape)}"
            )
        _check_kind(name, value, quantized, where)
        if not _all_finite(value):
            raise ValueError(f"{where}: {name} must be finite, it holds NaN or infinite numbers")


def _check_kind(name: str, value: Tensor, quantized: str | None, where: str) -> None:
    if name.endswith("head.weight") and quantized is not None:
        expected = FORMATS[quantized].dtype
        if value.dtype != expected:
            raise ValueError(
                f"{where}: {name} must hold {expected}, as {quantized} does, got {value.dtype}"
            )
    elif name.endswith(".weight_scale"):
        if value.dtype != torch.float32:
            raise ValueError(f"{where}: {name} must hold torch.float32, got {value.dtype}")
    elif not value.is_floating_point() or format_of(value) is not None:
        raise ValueError(f"{where}: {name} must hold floating-point numbers, got {value.dtype}")


def _all_finite(value: Tensor) -> bool:
    if value.dtype == torch.float8_e4m3fn:  # has NaN but no infinity; torch has no isfinite for it
        return not any(((x & 0x7F) == 0x7F).any() for x in _pieces(value.view(torch.uint8)))
    return not value.is_floating_point() or all(_is_finite(x) for x in _pieces(value))


def _is_finite(piece: Tensor) -> bool:
    """A finite sum proves it at a tenth of the cost. If the sum overflows, all are checked."""
    total = piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(piece).all())


def _pieces(value: Tensor) -> Iterator[Tensor]:
    """Views that cover a tensor, each small enough that a mask of it takes little memory."""
    if value.numel() <= _PIECE or value.dim() == 0:
        yield value
    elif value.shape[0] == 1:
        yield from _pieces(value[0])
    else:
        for part in value.split(max(1, _PIECE * value.shape[0] // value.numel())):
            yield from _pieces(part)


def _quantized_heads(config: DualHeadConfig) -> tuple[str, ...]:
    """The heads that `quantize` quantises; a correction is not."""
    return ("lm_head", "reward_head") if config.reward_head == "full" else ("lm_head",)


@torch.no_grad()
def load_head_state(
    head: Any, state: dict[str, Tensor], where: str, quantized: str | None = None
) -> None:
    """Load a file's tensors into a gated head that is not quantised, bit for bit.

    Raises:
        ValueError: see :func:`check_head_state`; the head stays as it was.
    """
    check_head_state(head.config, state, quantized, where)
    own = head.state_dict(keep_vars=True) | {"lm_head.weight": head.lm_weight}
    own["lm_head.bias"] = head.lm_bias
    if quantized is not None:
        state, weight = dict(state), head.lm_weight
        # Copies, since the tensors are memory-mapped and would change with the file.
        lm, *reward = (
            [
                state.pop(f"{part}.{name}").to(weight.device, copy=True)
                for name in ("weight", "weight_scale")
            ]
            for part in _quantized_heads(head.config)
        )
        if reward:
            bias = state.pop("reward_head.bias", None)
            bias = None if bias is None else bias.to(weight.device)
            head.hold_quantized(lm, *reward, bias, weight.dtype)
        else:
            head._hold_lm(*lm, weight.dtype)
    for name, value in state.items():
        parameter = own[name]
        sharded = isinstance(parameter, DTensor)  # for training: it has its dtype already
        if value.dtype != parameter.dtype and not name.startswith("lm_head.") and not sharded:
            parameter.data = parameter.data.to(value.dtype)  # heads trained in fp32 stay so
        copy_whole(parameter, value)
    trained = quantized is None and any(name.startswith("lm_head.") for name in state)
    head.lm_head_trained = trained or head.lm_head_trained
