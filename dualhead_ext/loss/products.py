# SPDX-License-Identifier: Apache-2.0
"""The matrix products of the fused loss: logits of some tokens, and the gradients of weights,
biases and hidden states.

Logits are sums of linear maps (`Linear`). z_LM is one map. z_RM has one map for each objective; for
a correction, it is z_LM's map plus one for each objective's delta.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import library

# Vocabulary rows of a weight, or of narrow logits, that are cast at a time.
VOCABULARY_BLOCK = 2048


@dataclass
class Tokens:
    """The N response tokens, row-major: rows, labels, gate_logit (N,), hidden (N, d)."""

    rows: Tensor
    labels: Tensor
    gate_logit: Tensor
    hidden: Tensor


@dataclass(eq=False)
class Linear:
    """A linear map with V rows, ``W x + b``, its features x, and its gradients (fp32 or float64;
    None if not needed).

    Attributes:
        weight, weight_grad: (V, m).
        bias, bias_grad: (V,); bias is None if there is none.
        features, features_grad: (N, m).
    """

    weight: Tensor
    bias: Tensor | None
    features: Tensor
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    features_grad: Tensor | None

    @property
    def trains(self) -> bool:
        """Whether any gradient is needed."""
        return any(x is not None for x in (self.weight_grad, self.bias_grad, self.features_grad))


# Logits as a weighted sum: (map, weight) of each term.
Terms = tuple[tuple[Linear, float], ...]


@dataclass
class Job:
    """Some tokens, and what their logits are needed for.

    Attributes:
        index: (n,), the tokens.
        lm: the terms of z_LM; None if nothing is mixed.
        reward: the terms of z_RM, or of the mixture if it is `summed`.
        in_lm: whether their log-probabilities are in the language-model term.
        objective: the reward head whose rewards they are part of, or None.
        pairs_mixed: whether rewards are log-probabilities of the mixture.
        in_kl: whether their KL is in the loss.
    """

    index: Tensor
    lm: Terms | None
    reward: Terms
    in_lm: bool = False
    objective: int | None = None
    pairs_mixed: bool = False
    in_kl: bool = False

    @property
    def summed(self) -> bool:
        """Whether the mixture's logits are a single sum of terms."""
        return self.in_lm and self.lm is None

    @property
    def needs_mixed(self) -> bool:
        """Whether log-probabilities of z_LM mixed with z_RM are needed."""
        in_lm = self.in_lm and not self.summed
        return in_lm or (self.objective is not None and self.pairs_mixed)

    @property
    def needs_reward(self) -> bool:
        """Whether log-probabilities of the `reward` terms are needed."""
        return self.summed or (self.objective is not None and not self.pairs_mixed)

    @property
    def rows(self) -> int:
        """The number of rows of logits: n, or 2 n with z_LM."""
        return len(self.index) * (1 if self.lm is None else 2)


@dataclass
class Product:
    """z (n, V), the logits of tokens ``index`` (n,): the sum of ``terms``, added to ``base``.

    base: parts of the z of earlier products that together have n rows; () for none.
    """

    terms: Terms
    index: Tensor
    z: Tensor
    base: tuple[Tensor, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether any map needs z's gradient."""
        return any(linear.trains for linear, _ in self.terms)


@functools.cache
def narrow_pays(device: str, dtype: torch.dtype) -> bool:
    """Whether products of this narrow dtype are faster than fp32 ones on the device."""
    if device != "cpu":
        return True
    if dtype != torch.bfloat16:
        return False  # fp16: few CPUs have AMX-FP16
    return library.problem("cpu") is not None or torch.ops.dualhead.cpu_bf16_pays()


def lay_out(
    jobs: Sequence[Job], workspace: Tensor
) -> tuple[list[Product], list[tuple[Tensor | None, Tensor]]]:
    """(products, views): the products that jobs need, with jobs of the same terms in one product;
    and for each job (z_LM or None, z_RM) as views of the workspace (rows, V).
    """
    groups: dict[tuple[str, Terms, bool], list[int]] = {}
    for i, job in enumerate(jobs):
        if job.lm is not None:
            groups.setdefault(("lm", job.lm, False), []).append(i)
        # A correction's z_RM is z_LM plus its own terms; a z_LM that exists is used again.
        on_lm = job.lm is not None and job.reward[: len(job.lm)] == job.lm
        terms = job.reward[len(job.lm) :] if on_lm else job.reward
        groups.setdefault(("reward", terms, on_lm), []).append(i)
    products: list[Any] = []
    views: dict[Any, Any] = {}
    start = 0
    for (name, terms, on_lm), members in groups.items():
        index = torch.cat([jobs[i].index for i in members])
        z = workspace[start : start + len(index)]
        start += len(index)
        base = tuple(views[i, "lm"] for i in members) if on_lm else ()
        products.append(Product(terms, index, z, base))
        parts = z.split([len(jobs[i].index) for i in members])
        views |= {(i, name): part for i, part in zip(members, parts, strict=True)}
    return products, [(views.get((i, "lm")), views[i, "reward"]) for i in range(len(jobs))]


class Products:
    """Products and their gradients, accumulated in fp32 (float64).

    Operands have the weight's dtype or autocast's if that is faster (`narrow_pays`). Otherwise they
    are cast to fp32, one block of vocabulary rows at a time.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        autocast = torch.is_autocast_enabled(device.type)
        self._autocast = torch.get_autocast_dtype(device.type) if autocast else None
        self.dtype = dtype
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._block: Tensor | None = None

    def compute(self, product: Product) -> None:
        """Compute product.z."""
        if product.base:
            torch.cat(product.base, out=product.z)
        for i, terms in enumerate(_by_weight(product.terms), 1 if product.base else 0):
            weight = self._weight(terms[0][0].weight)
            hidden, share = self._hidden(terms, product.index, weight)
            for block, rows in self._blocks(weight):
                z = product.z[:, block]
                if rows.dtype == self.dtype:
                    z.addmm_(hidden, rows.T, beta=float(i > 0), alpha=share)
                elif i == 0:
                    z.copy_(_widened(hidden, rows.T, self.dtype)).mul_(share)
                else:
                    z.add_(_widened(hidden, rows.T, self.dtype), alpha=share)
            for linear, of_linear in terms:
                if linear.bias is not None:
                    product.z.add_(linear.bias.to(self.dtype), alpha=of_linear)

    @staticmethod
    def pass_to_base(product: Product) -> None:
        """Add product.z, which now holds the logits' gradient, to the gradient of its base."""
        parts = product.z.split([len(part) for part in product.base])
        for part, dz in zip(product.base, parts, strict=True):
            part.add_(dz)

    def accumulate(self, product: Product) -> None:
        """Add the gradients of weights, biases and features. product.z now holds the logits'
        gradient.
        """
        dz = product.z
        for terms in _by_weight(product.terms):
            if not any(linear.trains for linear, _ in terms):
                continue
            weight = self._weight(terms[0][0].weight)
            total = terms[0][0].weight_grad
            if total is not None:
                self._add_to_weight(total, dz, weight, *self._hidden(terms, product.index, weight))
            back = None
            for linear, share in terms:
                if linear.bias_grad is not None:
                    linear.bias_grad.add_(dz.sum(0), alpha=share)
                if linear.features_grad is not None:
                    back = self._back(dz, weight) if back is None else back
                    linear.features_grad.index_add_(0, product.index, back, alpha=share)

    def _add_to_weight(
        self, total: Tensor, dz: Tensor, weight: Tensor, hidden: Tensor, share: float
    ) -> None:
        if hidden.dtype == self.dtype:
            total.addmm_(dz.T, hidden, alpha=share)
            return
        for block in _slices(len(weight)):
            part = _widened(dz[:, block].to(hidden.dtype).T, hidden, self.dtype)
            total[block].add_(part, alpha=share)

    def _back(self, dz: Tensor, weight: Tensor) -> Tensor:
        """dz W (n, m)."""
        out = dz.new_zeros(dz.shape[0], weight.shape[1])
        for block, rows in self._blocks(weight):
            if rows.dtype == self.dtype:
                out.addmm_(dz[:, block], rows)
            else:
                out.add_(_widened(dz[:, block].to(rows.dtype), rows, self.dtype))
        return out

    def _weight(self, weight: Tensor) -> Tensor:
        """The weight (V, m), in autocast's dtype if that is faster: one copy for the whole loss."""
        narrow = self._autocast
        if narrow is None or weight.dtype in (narrow, torch.float64):
            return weight
        if not narrow_pays(weight.device.type, narrow):
            return weight
        if id(weight) not in self._casts:  # keeps the weight, so that no other gets its id
            self._casts[id(weight)] = weight, weight.to(narrow)
        return self._casts[id(weight)][1]

    def _is_widened(self, weight: Tensor) -> bool:
        return weight.dtype != self.dtype and not narrow_pays(weight.device.type, weight.dtype)

    def _hidden(self, terms: Terms, index: Tensor, weight: Tensor) -> tuple[Tensor, float]:
        """(features (n, m) in the product's dtype, their weight). The features of several terms
        with one matrix are summed first.
        """
        dtype = self.dtype if self._is_widened(weight) else weight.dtype
        if len(terms) == 1:
            linear, share = terms[0]
            return linear.features[index].to(dtype), share
        total: Any = 0.0
        for linear, share in terms:
            total = total + share * linear.features[index].to(self.dtype)
        return total.to(dtype), 1.0

    def _blocks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice, rows of the weight in the product's dtype) for blocks of vocabulary rows."""
        if weight.dtype == self.dtype:
            yield slice(0, len(weight)), weight
            return
        widened = self._is_widened(weight)
        if widened and (self._block is None or self._block.shape[1] != weight.shape[1]):
            self._block = weight.new_empty(VOCABULARY_BLOCK, weight.shape[1], dtype=self.dtype)
        for block in _slices(len(weight)):
            rows = weight[block]
            yield block, self._block[: len(rows)].copy_(rows) if widened else rows


def _by_weight(terms: Terms) -> list[Terms]:
    """The terms, grouped by matrix."""
    groups: dict[int, list[tuple[Linear, float]]] = {}
    for linear, share in terms:
        groups.setdefault(id(linear.weight), []).append((linear, share))
    return [tuple(group) for group in groups.values()]


def _slices(size: int) -> Iterator[slice]:
    for start in range(0, size, VOCABULARY_BLOCK):
        yield slice(start, min(start + VOCABULARY_BLOCK, size))


def _widened(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of narrow operands: in ``dtype`` if the GEMM can write it, else in their dtype."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a @ b
