# SPDX-License-Identifier: Apache-2.0
"""Types and ranges of training arguments. transformers checks few of them: a wrong one would fail
after the backbone has run, or change the training without a word.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any

_KINDS = {int: Integral, float: Real, bool: bool}
_WORDS = {int: "a whole number", float: "a number", bool: "True or False"}
_NONE = type(None)
_LEAST = dict.fromkeys(
    (
        "learning_rate",
        "gate_learning_rate",
        "num_train_epochs",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "seed",
        "data_seed",
        "dataloader_num_workers",
    ),
    0,
)
_LEAST |= dict.fromkeys(
    (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "save_total_limit",
    ),
    1,
)
_BELOW = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}


@cache
def _types_of(kind: type) -> dict[str, tuple[type, ...]]:
    """The fields that hold numbers or truth values, with their types."""
    hints, found = typing.get_type_hints(kind), {}
    for field in fields(kind):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if union else (hint,)
        if set(members) <= {*_KINDS, _NONE}:
            found[field.name] = members
    return found


def check_arguments(arguments: Any, left_out: typing.Collection[str]) -> None:
    """Check fields by their annotations, and the ranges above.

    Text that is a number is converted for a number: YAML reads ``1e-8`` as text.

    Args:
        arguments: a dataclass of training arguments.
        left_out: fields that are checked elsewhere.
    Raises:
        TypeError: a value of another type.
        ValueError: a value outside its range.
    """
    kind: type = type(arguments)
    owner = kind.__name__
    for name, members in _types_of(kind).items():
        if name in left_out:
            continue
        value = getattr(arguments, name)
        if isinstance(value, str) and float in members:
            try:
                value = float(value)
            except ValueError:
                pass
            else:
                setattr(arguments, name, value)
        if not any(_is_a(member, value) for member in members):
            wanted = " or ".join(_WORDS[m] for m in members if m is not _NONE)
            raise TypeError(f"{owner}: {name} must be {wanted}, got {value!r}")
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{owner}: {name} must be >= {least}, got {value!r}")
    for name, bound in _BELOW.items():
        value = getattr(arguments, name)
        if value is not None and value >= bound:
            raise ValueError(f"{owner}: {name} must be below {bound}, got {value!r}")


def _is_a(kind: type, value: Any) -> bool:
    if kind is _NONE:
        return value is None
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1))
    of_kind = isinstance(value, _KINDS[kind]) and not isinstance(value, bool)
    return of_kind and not math.isnan(value)
