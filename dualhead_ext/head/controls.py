# SPDX-License-Identifier: Apache-2.0
"""The settings of a request: how the heads are mixed (:class:`Controls`) and how a token is chosen
(:class:`Sampling`).

These two objects are passed from ``generate()`` down to the operator. The keyword arguments of the
public methods, the options of the command and all checks are derived from their fields. torch is
not imported here, because ``dualhead generate --help`` reads the fields.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .cache import GateCache

    Fill = Callable[[str, float, torch.dtype], Tensor]


class Limits(NamedTuple):
    """The range of a control that is one number per request.

    ``expected`` describes the range in error messages. ``help`` and ``metavar`` describe the
    option of the command. ``neutral`` is the value that changes nothing; requests that do not set
    the control get it when others in the batch do. It is NaN if there is no such value.
    """

    lowest: float
    highest: float
    expected: str
    help: str = ""
    metavar: str = "X"
    above: bool = False  # lowest itself is out of range
    infinite: bool = False  # inf is in range
    neutral: float = math.nan

    def hold(self, number: float) -> bool:
        """Whether ``number`` is in range."""
        return self.lowest <= number <= self.highest and not (self.above and number == self.lowest)


def _limits(*limits: Any, **more: Any) -> dict[str, Limits]:
    return {"limits": Limits(*limits, **more)}


def limits_of(kind: type) -> dict[str, Limits]:
    """The limits of each numeric field of `Controls` or `Sampling`, by name."""
    return {f.name: f.metadata["limits"] for f in fields(kind) if "limits" in f.metadata}


class _Fields:
    """Methods that both classes share."""

    NAMES: ClassVar[tuple[str, ...]]
    LIMITS: ClassVar[dict[str, Limits]]

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> Any:
        """Remove the fields of this class from ``arguments`` and return an instance of them."""
        return cls(**{name: arguments.pop(name) for name in cls.NAMES if name in arguments})

    def given(self) -> dict[str, Any]:
        """The fields that are not None, by name."""
        found = {}
        for name in self.NAMES:  # a comprehension over __dict__ is beyond torch 2.11's compiler
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return found


@dataclass(eq=False)  # comparing tensors gives a tensor, not a bool
class Controls(_Fields):
    """How the two heads are mixed, per request. None leaves a control out.

    Args:
        strength: s >= 0 scales alpha, ``a <- s a``; in the probability mix the result is at most 1.
            0 gives z_LM itself. A number or (B,). Default 1.
        gate_offset: added to the gate's logit. A number or (B,). Default 0.
        alpha: replaces the gate's value, in [0, 1]. A number or (B,).
        max_kl: lowers alpha until ``KL(pi_mix || pi_LM) <= max_kl`` nats at each token
            (:func:`dualhead_ext.head.kl_cap.capped_alpha`); >= 0. A number or (B,). With it, the
            step is computed in eager PyTorch.
        skip_threshold: s in [0, 0.5]: alpha < s counts as 0, and |1 - alpha| < s as 1. It is
            applied after ``strength`` and before ``max_kl``. A number or (B,). Default 0.
            docs/generation.md has the bounds on the error.
        objective_weights: (K,) or (B, K); default 1/K each.
    """

    strength: Any = field(
        default=None,
        metadata=_limits(
            *(0.0, math.inf, "a number >= 0"),
            *("factor of alpha; 0 is the backbone (default 1)", "S"),
            neutral=1.0,
        ),
    )
    gate_offset: Any = field(
        default=None,
        metadata=_limits(-math.inf, math.inf, "a number", "added to the gate's logit", neutral=0.0),
    )
    alpha: Any = field(
        default=None,
        metadata=_limits(0.0, 1.0, "a number in [0, 1]", "a fixed alpha in place of the gate", "A"),
    )
    max_kl: Any = field(
        default=None,
        metadata=_limits(
            *(0.0, math.inf, "a number >= 0 (inf is no cap)"),
            "limit of the KL divergence from the backbone at each token, in nats",
            infinite=True,
            neutral=math.inf,
        ),
    )
    skip_threshold: Any = field(
        default=None,
        metadata=_limits(
            *(0.0, 0.5, "a number in [0, 0.5]"),
            "treat alpha this close to 0 or 1 as 0 or 1; a head may then be skipped (default 0)",
            "A",
            neutral=0.0,
        ),
    )
    objective_weights: Any = None

    def rows(
        self,
        operator: str,
        batch_size: int,
        num_objectives: int,
        dtype: torch.dtype,
        device: torch.device,
        fill: Fill | None = None,
    ) -> Controls:
        """The same controls as tensors of ``dtype`` on ``device``: (B,) each, objective_weights
        (B, K).

        Args:
            operator: named in error messages.
            fill: makes a (B,) tensor from a number; default ``torch.full``.
        Raises:
            TypeError: a control of another type. ValueError: a shape or a number out of range.
        """
        found = self.given()
        if not found:
            return self
        from .rows import objective_rows, per_row

        for name, value in found.items():
            if name == "objective_weights":
                found[name] = objective_rows(
                    operator, value, batch_size, num_objectives, dtype, device
                )
            else:
                limits = self.LIMITS[name]
                found[name] = per_row(
                    operator, name, limits, value, batch_size, dtype, device, fill
                )
        return Controls(**found)

    def repeat(self, repeats: int) -> Controls:
        """Each row ``repeats`` times, copies side by side: for beams, and for several samples of
        one prompt.
        """
        return Controls(**{n: x.repeat_interleave(repeats, 0) for n, x in self.given().items()})

    def select(self, index: Tensor) -> Controls:
        """The rows ``index`` (N,)."""
        return Controls(**{name: value[index] for name, value in self.given().items()})

    def operands(self) -> dict[str, Tensor]:
        """Rows as arguments of the operator. It has no ``max_kl``."""
        found = self.given()
        found.pop("max_kl", None)
        return found


@dataclass(eq=False)
class Sampling(_Fields):
    """How a token is chosen, per request.

    Args:
        do_sample: False (default) takes the argmax; ties go to the lowest index.
        temperature, top_k, top_p, min_p: numbers or (B,) tensors, applied in this order, as in
            Hugging Face. Defaults 1, 0, 1, 0: no effect. temperature 0 is greedy.
        seeds: (B,) int64. Default: drawn from ``generator`` once per cache. Token n of a request
            depends only on its seed, n and its distribution, not on its place in a batch.
        generator: a torch.Generator. Default: torch's global one.
    """

    do_sample: bool = False
    temperature: Any = field(
        default=1.0, metadata=_limits(0.0, math.inf, "a number >= 0 (0 is greedy)")
    )
    top_k: Any = field(default=0, metadata=_limits(0, 2**31 - 1, "an integer >= 0 (0 is off)"))
    top_p: Any = field(
        default=1.0, metadata=_limits(0.0, 1.0, "a number in (0, 1] (1 is off)", above=True)
    )
    min_p: Any = field(default=0.0, metadata=_limits(0.0, 1.0, "a number in [0, 1] (0 is off)"))
    seeds: Tensor | None = None
    generator: torch.Generator | None = None

    FILTERS: ClassVar[dict[str, float]]  # filter -> the value that turns it off

    def rows(self, operator: str, cache: GateCache, dtype: torch.dtype) -> Sampling:
        """The same with filters as (B,) tensors of ``dtype`` (top_k int32), or None for filters
        that are off.

        Raises:
            TypeError, ValueError: see :meth:`Controls.rows`.
        """
        if not isinstance(self.do_sample, bool):
            raise TypeError(f"{operator}: do_sample must be True or False, got {self.do_sample!r}")
        if not self.do_sample:
            return GREEDY
        import torch

        from .rows import per_row

        fill = None if torch.compiler.is_compiling() else cache.per_row
        count, device = cache.batch_size, cache.device
        found: dict[str, Any] = {}
        for name, off in self.FILTERS.items():
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) and value == off:
                value = None
            kind = torch.int32 if name == "top_k" else dtype
            limits = self.LIMITS[name]
            found[name] = per_row(operator, name, limits, value, count, kind, device, fill)
        return Sampling(True, **found, seeds=self.seeds, generator=self.generator)

    def operands(self, operator: str, cache: GateCache) -> dict[str, Any]:
        """Rows as arguments of the operator; none for greedy decoding. If neither the caller nor
        the cache has seeds, they are drawn now.

        Raises:
            TypeError, ValueError: seeds of another type or shape.
        """
        if not self.do_sample:
            return {}
        from .cache import seeds_of

        seeds = seeds_of(operator, cache, self.seeds, self.generator)
        filters = {name: getattr(self, name) for name in self.FILTERS}
        return {"seeds": seeds, "draws": cache.draws, **filters}


for _kind in (Controls, Sampling):
    _kind.NAMES = tuple(f.name for f in fields(_kind))
    _kind.LIMITS = limits_of(_kind)
Sampling.FILTERS = {name: getattr(Sampling, name) for name in Sampling.LIMITS}
GREEDY = Sampling()


def takes(*kinds: type) -> Callable[[Callable], Callable]:
    """A decorator for methods with ``**arguments``: help() and editors see the fields of these
    classes instead.
    """

    def decorate(method: Callable) -> Callable:
        signature = inspect.signature(method)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
            for kind in kinds
            for f in fields(kind)
        ]
        cast(Any, method).__signature__ = signature.replace(parameters=parameters)
        return method

    return decorate


def refuse_others(operator: str, arguments: dict[str, Any]) -> None:
    """Raise TypeError if ``arguments``, from which all known ones are removed, is not empty."""
    if arguments:
        raise TypeError(f"{operator}: unknown arguments {', '.join(sorted(arguments))}")
