# SPDX-License-Identifier: Apache-2.0
"""The gate's cache while decoding: keys and folded values of all past positions. Its size is
O(T (g + H)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .prompt_projection import PromptProjection
from .rows import dense


class DecodeWeights:
    """The tensors that ``decode_step`` reads, as they were when the cache was made.

    A parameter in the LM head's dtype is used itself; others are cast (heads are trained in fp32
    beside a bf16 backbone). The folded value rows are computed. Copies of a cache share this
    object.
    """

    def __init__(self, tensors: dict[str, Tensor | None], stamp: tuple) -> None:
        self.tensors = tensors
        self.stamp = stamp
        k_weight = tensors.get("k_weight")
        self.projection: PromptProjection | None = None  # for prompts, if the device supports it
        if k_weight is not None and PromptProjection.applies(k_weight):
            self.projection = PromptProjection(k_weight, tensors["u_weight"])

    def __deepcopy__(self, memo: dict) -> DecodeWeights:
        return self


def parameter_stamp(parameters: list[Tensor]) -> tuple:
    """Identifies the current values of parameters: it changes with an in-place update, a cast, a
    move or a load.
    """
    return tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in parameters)


def _without_padding(
    k: Tensor | None, u: Tensor | None, valid: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """k and u with zeros in padding columns: an attention weight of 0 does not hide a NaN."""
    if k is None:
        return k, u
    padding = ~valid[:, None]
    return k.masked_fill(padding[..., None], 0.0), u.masked_fill(padding, 0.0)


_LARGEST = 2**63 - 1  # what PyTorch takes


def _whole_number(method: str, name: str, value: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"GateCache.{method}: {name} must be an int, got {value!r}")
    if value > _LARGEST:
        raise ValueError(f"GateCache.{method}: {name} must fit in 64 bits, got {value}")


def _not_negative(method: str, name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"GateCache.{method}: {name} must be >= 0, got {value}")


class GateCache:
    """The gate's state for one batch of requests. Make it with ``head.new_cache``; ``prefill`` and
    ``step`` fill it.

    Attributes:
        k: (B, H, S, d_k), keys, in the head's dtype. None for a gate without attention.
        u: (B, H, S), folded values, fp32 (float64 for float64). None for a gate without attention.
        valid: (B, S) bool, False for padding.
        length: (B,) int32 on the device: columns filled, padding included. Kernels read it.
        seeds: (B,) int64, or None until the first sampled step.
        draws: (B,) int64: sampled steps so far.
        weights: the weights that the cache belongs to.
    """

    def __init__(
        self,
        weights: DecodeWeights,
        batch_size: int,
        max_length: int,
        *,
        heads: tuple[int, int] | None,
        dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weights = weights
        self.k = self.u = None
        if heads is not None:
            num_heads, head_dim = heads
            self.k = torch.zeros(
                batch_size, num_heads, max_length, head_dim, dtype=dtype, device=device
            )
            self.u = torch.zeros(
                batch_size, num_heads, max_length, dtype=value_dtype, device=device
            )
        self.valid = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.length = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.seeds: Tensor | None = None
        self.draws = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._columns: int | None = 0
        self._rows: dict = {}

    @property
    def batch_size(self) -> int:
        """B."""
        return self.valid.shape[0]

    @property
    def max_length(self) -> int:
        """S, the number of columns that fit."""
        return self.valid.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the cache."""
        return self.valid.device

    @property
    def columns(self) -> int:
        """Columns filled, as an int on the host. After steps that only the device has counted
        (compiled or graph-captured ones) the first read synchronises.
        """
        if self._columns is None:
            self._columns = int(self.length.max()) if self.batch_size else 0
        return self._columns

    def advanced_on_device(self) -> None:
        """Note that ``length`` has grown on the device only; see :attr:`columns`."""
        self._columns = None

    def require_room(self, operator: str, count: int) -> None:
        """Raise TypeError or ValueError unless ``count`` >= 0 more columns fit."""
        _whole_number("require_room", "count", count)
        _not_negative("require_room", "count", count)
        if self.columns + count > self.max_length:
            raise ValueError(
                f"{operator}: cache holds {self.columns} of max_length = {self.max_length} "
                f"columns, {count} more do not fit; make it with a larger max_length"
            )

    def append(self, k: Tensor | None, u: Tensor | None, valid: Tensor) -> None:
        """Write n new columns: k (B, H, n, d_k), u (B, H, n), valid (B, n) bool.

        Raises:
            TypeError, ValueError: a shape, dtype or device, or no room; nothing is written.
        """
        dense("GateCache.append", "valid", valid, self.device)
        if valid.dtype != torch.bool or valid.dim() != 2 or valid.shape[0] != self.batch_size:
            raise ValueError(
                f"GateCache.append: valid must be ({self.batch_size}, n) bool, "
                f"got {tuple(valid.shape)} of {valid.dtype}"
            )
        for name, new, own in (("k", k, self.k), ("u", u, self.u)):
            if own is None:
                continue
            dense("GateCache.append", name, new, self.device)
            shape = (*own.shape[:2], valid.shape[1], *own.shape[3:])
            if new.shape != shape or not new.is_floating_point():
                raise ValueError(
                    f"GateCache.append: {name} must be {shape} of floating-point numbers, "
                    f"got {tuple(new.shape)} of {new.dtype}"
                )
        k, u = _without_padding(k, u, valid)
        start, count = self.columns, valid.shape[1]
        self.require_room("GateCache.append", count)
        if self.k is not None:
            self.k[:, :, start : start + count] = k
            self.u[:, :, start : start + count] = u
        self.valid[:, start : start + count] = valid
        self.length += count
        self._columns = start + count

    def append_on_device(self, k: Tensor | None, u: Tensor | None, valid: Tensor) -> None:
        """:meth:`append` at the columns in ``length``, without a synchronisation: for compiled
        code. The caller makes sure that they fit.
        """
        k, u = _without_padding(k, u, valid)
        columns = self.length[:, None] + torch.arange(valid.shape[1], device=self.device)
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        columns = columns.long()
        if self.k is not None:
            self.k[rows, :, columns] = k.transpose(1, 2)
            self.u[rows, :, columns] = u.transpose(1, 2)
        self.valid[rows, columns] = valid
        self.length += valid.shape[1]
        self.advanced_on_device()

    def count_step(self) -> None:
        """Count a column on the host that a fused step has already written."""
        self._columns = self.columns + 1

    def reserve(self, max_length: int) -> None:
        """Make room for at least ``max_length`` columns; the columns in use are kept.

        Raises:
            TypeError, ValueError: not an int of at least 0. The cache stays as it was.
        """
        _whole_number("reserve", "max_length", max_length)
        _not_negative("reserve", "max_length", max_length)
        extra = max_length - self.max_length
        if extra <= 0:
            return
        if self.k is not None:
            self.k = torch.cat(
                (self.k, self.k.new_zeros(*self.k.shape[:2], extra, self.k.shape[3])), dim=2
            )
            self.u = torch.cat((self.u, self.u.new_zeros(*self.u.shape[:2], extra)), dim=2)
        self.valid = torch.cat((self.valid, self.valid.new_zeros(self.batch_size, extra)), dim=1)

    def select(self, indices: Tensor) -> None:
        """Keep, reorder or repeat rows: row b becomes the old row ``indices[b]`` (beam search).

        Raises:
            TypeError: not a tensor. ValueError: not (N,) integers, or on the CPU an index outside
                0..B-1. The cache stays as it was.
        """
        dense("GateCache.select", "indices", indices, self.device)
        if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
            raise ValueError(
                "GateCache.select: indices must be (N,) int32 or int64, "
                f"got {tuple(indices.shape)} of {indices.dtype}"
            )
        if indices.device.type == "cpu" and indices.numel():
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= self.batch_size:
                raise ValueError(
                    f"GateCache.select: indices must be in 0..{self.batch_size - 1}, "
                    f"got {low if low < 0 else high}"
                )
        indices = indices.to(self.device)
        for name in ("k", "u", "valid", "length", "seeds", "draws"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, indices))
        self._rows.clear()

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies side by side. Copies get different seeds, since
        equal seeds would sample equal text.

        Raises:
            TypeError, ValueError: not an int of at least 1. The cache stays as it was.
        """
        _whole_number("repeat_interleave", "repeats", repeats)
        if repeats < 1:
            raise ValueError(
                f"GateCache.repeat_interleave: repeats must be at least 1, got {repeats}"
            )
        self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))
        if self.seeds is not None:
            self.seeds = self.seeds + torch.arange(repeats, device=self.device).repeat(
                self.batch_size // repeats
            )

    def crop(self, columns: int) -> None:
        """Forget all but the first ``columns`` columns.

        Raises:
            TypeError, ValueError: not an int of at least 0. The cache stays as it was.
        """
        _whole_number("crop", "columns", columns)
        _not_negative("crop", "columns", columns)
        self.length.clamp_(max=min(columns, self.max_length))
        self._columns = min(self.columns, columns)

    def reset(self) -> None:
        """Empty the cache and keep its memory. The next sampled step draws new seeds."""
        self.length.zero_()
        self.valid.zero_()
        self.draws.zero_()
        self.seeds = None
        self._columns = 0

    def per_row(self, name: str, value: float, dtype: torch.dtype) -> Tensor:
        """A (B,) tensor filled with ``value``, memoised because steps run in tight loops."""
        key = (name, value, dtype)
        if key not in self._rows:
            if len(self._rows) >= 64:  # for a caller with another temperature at every step
                self._rows.clear()
            self._rows[key] = torch.full((self.batch_size,), value, dtype=dtype, device=self.device)
        return self._rows[key]


def seeds_of(
    operator: str, cache: GateCache, seeds: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """``seeds`` (B,) int64, or else the cache's, which are drawn from ``generator`` at first use.

    Raises:
        TypeError: not an int64 tensor. ValueError: another shape.
    """
    if seeds is not None:
        if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
            got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
            raise TypeError(f"{operator}: seeds must be an int64 tensor, got {got}")
        dense(operator, "seeds", seeds, cache.device)
        if seeds.shape != (cache.batch_size,):
            raise ValueError(
                f"{operator}: seeds must be ({cache.batch_size},), got {tuple(seeds.shape)}"
            )
        return seeds.to(cache.device)
    if cache.seeds is None:
        where = cache.device if generator is None else generator.device
        drawn = torch.randint(
            -(2**63), 2**63 - 1, (cache.batch_size,), generator=generator, device=where
        )
        cache.seeds = drawn.to(cache.device)
    return cache.seeds
