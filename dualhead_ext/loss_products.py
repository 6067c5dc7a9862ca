# SPDX-License-Identifier: Apache-2.0
"""The fused loss's matrix products: some tokens' logits, and what their gradients mean for weights,
biases and hidden states.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _extension
from .reference import accumulator_dtype
from .reference_loss import Heads

# Vocabulary rows that are cast at a time, of a weight or of narrow logits.
VOCABULARY_BLOCK = 2048

# Heads and their shares in a sum of logits, (k, w_k).
Terms = tuple[tuple[int, float], ...]
LM_HEAD: Terms = ((0, 1.0),)


@dataclass
class Tokens:
    """The N response tokens, row-major: rows, labels, gate_logit (N,), hidden (N, d)."""

    rows: Tensor
    labels: Tensor
    gate_logit: Tensor
    hidden: Tensor


@dataclass
class Job:
    """Some tokens and what is wanted of their logits.

    Attributes:
        index: (n,) which tokens.
        reward: the objectives that make z_RM = sum_k w_k z_k.
        in_lm, in_pairs: the terms that these tokens' log-probabilities go into.
        pairs_mixed: the preference term takes the mixture's, too.
    """

    index: Tensor
    reward: Terms
    in_lm: bool
    in_pairs: bool
    pairs_mixed: bool

    @property
    def mixes(self) -> bool:
        return self.in_lm or (self.in_pairs and self.pairs_mixed)


@dataclass
class Product:
    """z (n, V): the logits of tokens ``index`` (n,) under ``terms`` of the heads ``name``."""

    name: str
    terms: Terms
    index: Tensor
    z: Tensor


@functools.cache
def narrow_pays(device: str, dtype: torch.dtype) -> bool:
    """Whether products of this narrow dtype are faster than fp32 ones on the device."""
    if device != "cpu":
        return True
    if dtype != torch.bfloat16:
        return False  # fp16: no CPU of today, but for AMX-FP16's few
    return _extension.problem("cpu") is not None or torch.ops.dualhead.cpu_bf16_pays()


def lay_out(
    jobs: Sequence[Job], workspace: Tensor
) -> tuple[list[Product], list[tuple[Tensor | None, Tensor]]]:
    """The products that jobs need, jobs of one head together, and each job's (z_LM or None, z_RM)
    as views of the workspace (rows, V) that they fill.
    """
    groups: dict[tuple[str, Terms], list[int]] = {}
    for i, job in enumerate(jobs):
        if job.mixes:
            groups.setdefault(("lm", LM_HEAD), []).append(i)
        groups.setdefault(("reward", job.reward), []).append(i)
    products, views, start = [], {}, 0
    for (name, terms), members in groups.items():
        index = torch.cat([jobs[i].index for i in members])
        z = workspace[start : start + len(index)]
        start += len(index)
        products.append(Product(name, terms, index, z))
        parts = z.split([len(jobs[i].index) for i in members])
        views |= {(i, name): part for i, part in zip(members, parts, strict=True)}
    return products, [(views.get((i, "lm")), views[i, "reward"]) for i in range(len(jobs))]


class Products:
    """Products with the heads' weights, into fp32 (float64), and their gradients, summed there.

    A product's operands have the weight's dtype or autocast's where that is faster
    (`narrow_pays`), and are widened otherwise, a block of vocabulary rows at a time.
    """

    def __init__(self, tokens: Tokens, heads: Heads, wanted: dict[str, bool]) -> None:
        device = tokens.hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self._autocast = torch.get_autocast_dtype(device) if autocast else None
        self._tokens, self.dtype = tokens, accumulator_dtype(tokens.hidden.dtype)
        self._weights = {"lm": heads.lm_weight[None], "reward": heads.reward_weight}
        self._biases = {
            "lm": None if heads.lm_bias is None else heads.lm_bias[None],
            "reward": heads.reward_bias,
        }
        self._casts: dict[tuple[str, int], Tensor] = {}
        self._block: Tensor | None = None

        def sums(name: str, like: Tensor | None) -> Tensor | None:
            if like is None or not wanted[name]:
                return None
            return torch.zeros(like.shape, dtype=self.dtype, device=like.device)

        self.weight_grads = {n: sums(f"{n}_weight", w) for n, w in self._weights.items()}
        self.bias_grads = {n: sums(f"{n}_bias", b) for n, b in self._biases.items()}
        self.hidden_grad = sums("hidden", tokens.hidden)

    def compute(self, product: Product) -> None:
        """Fill product.z."""
        for i, (k, share) in enumerate(product.terms):
            weight = self._weight(product.name, k)
            hidden = self._hidden(product, weight)
            for block, rows in self._blocks(weight):
                z = product.z[:, block]
                if rows.dtype == self.dtype:
                    z.addmm_(hidden, rows.T, beta=float(i > 0), alpha=share)
                elif i == 0:
                    z.copy_(_widened(hidden, rows.T, self.dtype)).mul_(share)
                else:
                    z.add_(_widened(hidden, rows.T, self.dtype), alpha=share)
            if self._biases[product.name] is not None:
                product.z.add_(self._biases[product.name][k].to(self.dtype), alpha=share)

    def accumulate(self, product: Product) -> None:
        """Add what product.z, now the logits' gradient, means for weights, biases, hidden."""
        dz = product.z
        for k, share in product.terms:
            weight = self._weight(product.name, k)
            hidden = self._hidden(product, weight)
            bias, total = self.bias_grads[product.name], self.weight_grads[product.name]
            if bias is not None:
                bias[k].add_(dz.sum(0), alpha=share)
            if total is not None and hidden.dtype == self.dtype:
                total[k].addmm_(dz.T, hidden, alpha=share)
            elif total is not None:
                for block in _slices(len(weight)):
                    part = _widened(dz[:, block].to(hidden.dtype).T, hidden, self.dtype)
                    total[k][block].add_(part, alpha=share)
            if self.hidden_grad is not None:
                self.hidden_grad.index_add_(0, product.index, self._back(dz, weight), alpha=share)

    def _back(self, dz: Tensor, weight: Tensor) -> Tensor:
        """dz W (n, d)."""
        out = dz.new_zeros(dz.shape[0], weight.shape[1])
        for block, rows in self._blocks(weight):
            if rows.dtype == self.dtype:
                out.addmm_(dz[:, block], rows)
            else:
                out.add_(_widened(dz[:, block].to(rows.dtype), rows, self.dtype))
        return out

    def _weight(self, name: str, k: int) -> Tensor:
        """(V, d), in autocast's dtype where that pays: one copy for the whole loss."""
        weight = self._weights[name][k]
        narrow = self._autocast
        if narrow is None or weight.dtype in (narrow, torch.float64):
            return weight
        if not narrow_pays(weight.device.type, narrow):
            return weight
        if (name, k) not in self._casts:
            self._casts[name, k] = weight.to(narrow)
        return self._casts[name, k]

    def _is_widened(self, weight: Tensor) -> bool:
        return weight.dtype != self.dtype and not narrow_pays(weight.device.type, weight.dtype)

    def _hidden(self, product: Product, weight: Tensor) -> Tensor:
        """(n, d) in the product's dtype."""
        dtype = self.dtype if self._is_widened(weight) else weight.dtype
        return self._tokens.hidden[product.index].to(dtype)

    def _blocks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary rows, those of the weight in the product's dtype)."""
        if weight.dtype == self.dtype:
            yield slice(0, len(weight)), weight
            return
        widened = self._is_widened(weight)
        if widened and self._block is None:
            self._block = weight.new_empty(VOCABULARY_BLOCK, weight.shape[1], dtype=self.dtype)
        for block in _slices(len(weight)):
            rows = weight[block]
            yield block, self._block[: len(rows)].copy_(rows) if widened else rows


def _slices(size: int) -> Iterator[slice]:
    for start in range(0, size, VOCABULARY_BLOCK):
        yield slice(start, min(start + VOCABULARY_BLOCK, size))


def _widened(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of narrow operands: in ``dtype`` where the GEMM can write that, else in theirs."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a @ b
