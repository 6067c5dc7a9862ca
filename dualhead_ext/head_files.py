# SPDX-License-Identifier: Apache-2.0
"""The tensors of a gated head as files hold them: which, of what shape and kind, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import DualHeadConfig
from .head import DualHead
from .quantization import FORMATS, format_of, storage_shapes


def head_state(head: Any) -> dict[str, Tensor]:
    """The tensors of a gated head that files hold, by the names that files use: gate.*,
    reward_head.*, and lm_head.* where it is not the backbone's own (trained or quantised).
    """
    state = {name: value for name, value in head.state_dict().items() if "." in name}
    if head.owns_lm_head:
        own = {"weight": head.lm_weight, "bias": head.lm_bias, "weight_scale": head.lm_scale}
        state |= {f"lm_head.{name}": value for name, value in own.items() if value is not None}
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def check_head_state(
    config: DualHeadConfig, state: dict[str, Tensor], quantized: str | None, where: str
) -> None:
    """Raise ValueError unless a file's tensors are those of a head of ``config`` in the format
    ``quantized`` (None: full precision): every name is there, no other, each of its shape and kind.
    """
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DualHead(config).state_dict().items()}
    if quantized is not None:
        for head in ("lm_head", "reward_head"):
            names = f"{head}.weight", f"{head}.weight_scale"
            shapes |= zip(names, storage_shapes(quantized, shapes[names[0]]), strict=True)
    elif not any(name.startswith("lm_head.") for name in state):
        shapes = {n: shape for n, shape in shapes.items() if not n.startswith("lm_head.")}
    missing, unknown = sorted(set(shapes) - set(state)), sorted(set(state) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"{where}: the heads' file must hold {', '.join(sorted(shapes))}; missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    for name, value in state.items():
        if value.shape != shapes[name]:
            raise ValueError(
                f"{where}: {name} must be {tuple(shapes[name])}, got {tuple(value.shape)}"
            )
        _check_kind(name, value, quantized, where)


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
        if not torch.isfinite(value).all():
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinite scales")
    elif not value.is_floating_point() or format_of(value) is not None:
        raise ValueError(f"{where}: {name} must hold floating-point numbers, got {value.dtype}")


@torch.no_grad()
def load_head_state(
    head: Any, state: dict[str, Tensor], where: str, quantized: str | None = None
) -> None:
    """Tensors of a file into a gated head that is not quantised, bit for bit.

    Raises:
        ValueError: as :func:`check_head_state`; the head is left as it was.
    """
    check_head_state(head.config, state, quantized, where)
    own = head.state_dict(keep_vars=True) | {"lm_head.weight": head.lm_weight}
    own["lm_head.bias"] = head.lm_bias
    if quantized is not None:
        state, weight = dict(state), head.lm_weight
        lm, reward = (
            [state.pop(f"{part}.{name}").to(weight.device) for name in ("weight", "weight_scale")]
            for part in ("lm_head", "reward_head")
        )
        bias = state.pop("reward_head.bias", None)
        bias = None if bias is None else bias.to(weight.device)
        head.hold_numbers(lm, reward, bias, weight.dtype)
    for name, value in state.items():
        parameter = own[name]
        if value.dtype != parameter.dtype and not name.startswith("lm_head."):
            parameter.data = parameter.data.to(value.dtype)  # heads trained in fp32 stay so
        parameter.copy_(value)
    trained = quantized is None and any(name.startswith("lm_head.") for name in state)
    head.lm_head_trained = trained or head.lm_head_trained
