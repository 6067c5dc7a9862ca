# SPDX-License-Identifier: Apache-2.0
"""The objective without N x V logits: `reference_loss.dual_head_loss` a chunk of tokens at a time.

The sums of a pair and with them its coefficient are known as soon as its own tokens are through the
products. So a chunk holds whole pairs: products into a workspace, log-probabilities, sums, the
preference coefficient, then dz in place of the logits, dW and d(gate logit). Nothing is computed
twice, but for a pair too long for the workspace. Gradients are made in forward and scaled in
backward. Response tokens are gathered first; z_LM is computed only where the mixture is wanted.

What decides over sizes and chunks (lengths, objectives, their weights) lies on the host, so that
nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import loss_rows
from .loss_products import Job, Product, Products, Tokens, lay_out
from .losses import (
    LM_REDUCTIONS,
    PREFERENCE_REDUCTIONS,
    DualHeadLossOutput,
    LossCounts,
    LossOptions,
    at_least_one,
    gate_entropy,
    pair_loss,
)
from .reference_loss import Heads, RowSums, combine, gate_statistics

# Logits of a chunk, in bytes: at V = 32000 and fp32 512 rows. Half of it is 15 % slower there (more
# passes over dW), twice as much gains nothing.
WORKSPACE_BYTES = 64 << 20

# Jobs with their rows, and the products that they share.
Computed = tuple[list[tuple[Job, loss_rows.Rows]], list[Product]]


def on_device(x: Tensor) -> bool:
    """Whether the host would have to wait to read x."""
    return x.device.type != "cpu"


class Pass:
    """One pass over a batch: :meth:`run` fills the sums of rows and, if wanted, the gradients.
    known_lengths: lengths, as the host knows them.
    """

    def __init__(
        self,
        tokens: Tokens,
        lengths: Tensor,
        known_lengths: list[int],
        heads: Heads,
        options: LossOptions,
        num_pairs: int,
        objective: Tensor | None,
        counts: LossCounts,
        wanted: dict[str, bool],
    ) -> None:
        self.tokens, self.lengths, self.options = tokens, lengths, options
        self.num_pairs, self.counts = num_pairs, counts
        self.products = Products(tokens, heads, wanted)
        self.needs_gradients = any(wanted.values())
        self.wants_gate = wanted["gate_logit"]
        self._lm_gradients = wanted["lm_weight"] or wanted["lm_bias"] or wanted["hidden"]
        dtype, device = self.products.dtype, tokens.hidden.device
        self.lm_nll = torch.zeros(len(lengths), dtype=dtype, device=device)
        self.pair_logps = torch.zeros_like(self.lm_nll)
        self.gate_grad = torch.zeros_like(tokens.gate_logit)
        self._starts = [0, *accumulate(known_lengths)]
        self._longest = max(known_lengths)
        self._objective = None if objective is None else objective.tolist()
        count = heads.reward_weight.shape[0]
        weights = heads.objective_weights
        shares = [1.0 / count] * count if weights is None else weights.tolist()
        self._mixture = tuple(enumerate(shares))
        self._one = self._mixture == ((0, 1.0),)
        vocab = heads.lm_weight.shape[0]
        # Two rows at least: a token's z_LM and z_RM. Four at most, where it has two jobs that mix.
        self._budget = max(2, WORKSPACE_BYTES // (vocab * self.lm_nll.element_size()))
        rows = min(self._budget, 4 * len(tokens.rows))
        self._workspace = torch.empty(rows, vocab, dtype=dtype, device=device)
        self._lm_count = at_least_one(LM_REDUCTIONS[options.lm_reduction](counts))

    # --- what the chunks are ---

    def _jobs(self, first: int, last: int, in_lm: bool, objectives: list[int] | None) -> list[Job]:
        """For the tokens of rows [first, last): of pairs with these objectives, or of none."""
        index = self._tokens_of(first, last)
        mixed = self.options.pref_on == "mixed"
        if objectives is None or (self._one and in_lm):
            return [Job(index, self._mixture, in_lm, objectives is not None, mixed)]
        jobs = [Job(index, self._mixture, True, False, False)] if in_lm else []
        for k in sorted(set(objectives)):
            rows = [first + i for i, of_row in enumerate(objectives) if of_row == k]
            index = torch.cat([self._tokens_of(row, row + 1) for row in rows])
            jobs.append(Job(index, ((k, 1.0),), False, True, mixed))
        return jobs

    def _tokens_of(self, first: int, last: int) -> Tensor:
        """Of rows [first, last)."""
        device = self.tokens.rows.device
        return torch.arange(self._starts[first], self._starts[last], device=device)

    def _rows_of_logits(self, jobs: list[Job]) -> int:
        return sum(len(job.index) * (2 if job.mixes else 1) for job in jobs)

    def _chunks(self) -> Iterator[tuple[list[Job], list[int]]]:
        """(jobs, their consecutive pairs): pairs until the workspace is full, then rows without."""
        in_lm, P = self.options.lm_on_chosen, self.num_pairs

        def of_pairs(first: int, last: int) -> list[Job]:
            kinds = [0] * (last - first) if self._objective is None else self._objective[first:last]
            jobs = self._jobs(first, last, in_lm, kinds)
            return jobs + self._jobs(P + first, P + last, False, kinds)

        yield from self._packed(0, P, of_pairs, lambda a, b: list(range(a, b)))
        rest = range(2 * P, len(self.lengths))
        yield from self._packed(
            rest.start, rest.stop, lambda a, b: self._jobs(a, b, True, None), lambda a, b: []
        )

    def _packed(
        self,
        first: int,
        stop: int,
        jobs_of: Callable[[int, int], list[Job]],
        pairs_of: Callable[[int, int], list[int]],
    ) -> Iterator[tuple[list[Job], list[int]]]:
        """Runs of consecutive examples, each as long as the workspace allows, one at least."""
        while first < stop:
            last, jobs = first + 1, jobs_of(first, first + 1)
            while last < stop:
                more = jobs_of(first, last + 1)
                if self._rows_of_logits(more) > self._budget:
                    break
                last, jobs = last + 1, more
            yield [job for job in jobs if len(job.index)], pairs_of(first, last)
            first = last

    def _pieces(self, job: Job) -> Iterator[Job]:
        """The job in parts that fit into the workspace alone."""
        size = max(1, self._budget // (2 if job.mixes else 1))
        for index in job.index.split(size):
            yield Job(index, job.reward, job.in_lm, job.in_pairs, job.pairs_mixed)

    # --- the work ---

    def run(self) -> None:
        """All chunks."""
        for jobs, pairs in self._chunks():
            if self._rows_of_logits(jobs) <= self._budget:
                computed = self._log_probabilities(jobs)
                self._gradients(computed, self._pair_coefficients(pairs))
                continue
            # Too long for the workspace: once for the sums, once more for the gradients.
            pieces = [piece for job in jobs for piece in self._pieces(job)]
            for piece in pieces:
                self._log_probabilities([piece])
            if not self.needs_gradients:
                continue
            coefficients = self._pair_coefficients(pairs)
            for piece in pieces:
                self._gradients(self._log_probabilities([piece], record=False), coefficients)

    def _log_probabilities(self, jobs: list[Job], record: bool = True) -> Computed:
        products, logits = lay_out(jobs, self._workspace)
        for product in products:
            self.products.compute(product)
        held = []
        for job, (z_lm, z_rm) in zip(jobs, logits, strict=True):
            rows = loss_rows.log_probabilities(
                z_lm,
                z_rm,
                self.tokens.gate_logit[job.index],
                self.tokens.labels[job.index],
                self.options,
                mixed=job.mixes,
                reward=job.in_pairs and not job.pairs_mixed,
            )
            held.append((job, rows))
            if record:
                self._record(job, rows)
        return held, products

    def _record(self, job: Job, rows: loss_rows.Rows) -> None:
        if job.in_lm:
            self.lm_nll -= self._row_sums(job.index, rows.mixed)
        if job.in_pairs:
            found = rows.mixed if job.pairs_mixed else rows.reward
            self.pair_logps += self._row_sums(job.index, found)

    def _row_sums(self, index: Tensor, of_tokens: Tensor) -> Tensor:
        """(R,), in one order: index_add_ has none on CUDA."""
        of_row = self.tokens.rows[index]
        column = index - (self.lengths.cumsum(0) - self.lengths)[of_row]
        dense = of_tokens.new_zeros(len(self.lengths), self._longest)
        return dense.index_put_((of_row, column), of_tokens).sum(-1)

    def _pair_coefficients(self, pairs: list[int]) -> Tensor:
        """dL / d(sum of log-probabilities) of each row (R,), those of these pairs filled in."""
        out = torch.zeros_like(self.pair_logps)
        if not pairs or not self.needs_gradients:
            return out
        index = torch.arange(pairs[0], pairs[0] + len(pairs), device=out.device)
        index = torch.cat((index, index + self.num_pairs))
        lengths, options = self.lengths[index], self.options
        with torch.enable_grad():
            sums = self.pair_logps[index].requires_grad_()
            reduced = PREFERENCE_REDUCTIONS[options.pref_reduction](sums, lengths)
            chosen, rejected = (options.beta_r * reduced).chunk(2)
            losses = pair_loss(chosen - rejected - options.gamma, options.label_smoothing)
            losses = losses.masked_fill(sum(lengths.chunk(2)) == 0, 0.0)
            total = options.lambda_r * losses.sum() / at_least_one(self.counts.pairs)
            out[index] = torch.autograd.grad(total, sums)[0]
        return out

    def _gradients(self, computed: Computed, of_pairs: Tensor) -> None:
        if not self.needs_gradients:
            return
        held, products = computed
        for job, rows in held:
            self._logit_gradients(job, rows, of_pairs)
        for product in products:
            if product.name == "reward" or self._lm_gradients:
                self.products.accumulate(product)

    def _logit_gradients(self, job: Job, rows: loss_rows.Rows, of_pairs: Tensor) -> None:
        """In the logits' place, and the gate's."""
        pair = of_pairs[self.tokens.rows[job.index]]
        mixed = torch.zeros_like(pair)
        if job.in_lm:
            mixed = (mixed - 1.0) / self._lm_count
        if job.in_pairs and job.pairs_mixed:
            mixed = mixed + pair
        gate = loss_rows.gradients_(
            rows, mixed, pair if rows.reward is not None else None, lm=self._lm_gradients
        )
        if gate is not None:
            self.gate_grad.index_add_(0, job.index, gate.to(self.gate_grad.dtype))


_INPUTS = ("hidden", "gate_logit", "lm_weight", "lm_bias", "reward_weight", "reward_bias")


class _Carrier(torch.autograd.Function):
    """A zero whose gradient is that of both heads' terms."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[dict[str, bool]], Pass], *inputs: Tensor | None) -> tuple:
        ctx.run, ctx.wanted = run, dict(zip(_INPUTS, ctx.needs_input_grad[1:], strict=True))
        result = run(ctx.wanted)
        ctx.gradients = _gradients_of(result)
        ctx.likes = [None if x is None else (x.shape, x.dtype) for x in inputs]
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(result.lm_nll, result.pair_logps)
        return inputs[1].new_zeros(()), result.lm_nll, result.pair_logps

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *unused: Any) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dual_head_loss: has a first derivative only; create_graph=True is not supported"
            )
        # Scaled in place and let go of, so that autograd takes them for .grad without a copy. A
        # second pass over a retained graph makes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _ = ctx.saved_tensors  # raises if the graph was freed or an input changed since
            gradients = _gradients_of(ctx.run(ctx.wanted))
        if on_device(scale) or scale != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(scale)
        return None, *(
            None if g is None else g.to(like[1]).view(like[0])
            for g, like in zip(gradients, ctx.likes, strict=True)
        )


def _gradients_of(result: Pass) -> list[Tensor | None]:
    """One for each of `_INPUTS`, None where it is not wanted."""
    products = result.products
    weights, biases = products.weight_grads, products.bias_grads
    return [
        products.hidden_grad,
        result.gate_grad if result.wants_gate else None,
        weights["lm"],
        biases["lm"],
        weights["reward"],
        biases["reward"],
    ]


def dual_head_loss(
    hidden: Tensor,
    labels: Tensor,
    mask: Tensor,
    gate_logit: Tensor,
    heads: Heads,
    options: LossOptions,
    num_pairs: int,
    objective: Tensor | None = None,
    counts: LossCounts | None = None,
    lengths: list[int] | None = None,
) -> DualHeadLossOutput:
    """As :func:`dualhead_ext.reference_loss.dual_head_loss`, over checked arguments. Waits for a
    device only if lengths are not given, or objective or heads.objective_weights lie there.
    """
    counted = mask.bool().sum(-1)
    if lengths is None:
        lengths = counted.tolist()
    rows, columns = torch.nonzero_static(mask.bool(), size=sum(lengths)).unbind(-1)
    if counts is None:
        counts = LossCounts.of_lengths(counted, num_pairs, options.lm_on_chosen)
    picked, picked_gate = hidden[rows, columns], gate_logit[rows, columns]

    def run(wanted: dict[str, bool]) -> Pass:
        tokens = Tokens(rows, labels[rows, columns].long(), picked_gate.detach(), picked.detach())
        parts = (heads.lm_weight, heads.lm_bias, heads.reward_weight, heads.reward_bias)
        frozen = Heads(*(None if x is None else x.detach() for x in parts), heads.objective_weights)
        work = Pass(tokens, counted, lengths, frozen, options, num_pairs, objective, counts, wanted)
        # What autocast asks for is in `work.products`; it must not touch anything else.
        with torch.autocast(hidden.device.type, enabled=False):
            work.run()
        return work

    inputs = (
        picked, picked_gate, heads.lm_weight, heads.lm_bias, heads.reward_weight, heads.reward_bias
    )  # fmt: skip
    if torch.is_grad_enabled():
        carrier, lm_nll, pair_logps = _Carrier.apply(run, *inputs)
    else:
        done = run(dict.fromkeys(_INPUTS, False))
        carrier, lm_nll, pair_logps = None, done.lm_nll, done.pair_logps

    def sums(of_tokens: Tensor) -> Tensor:
        dense = of_tokens.new_zeros(mask.shape)
        return dense.index_put((rows, columns), of_tokens).sum(-1)

    per_row = RowSums(lm_nll, pair_logps, sums(gate_entropy(picked_gate)), counted)
    gate_sums = {name: sums(x) for name, x in gate_statistics(picked_gate).items()}
    out = combine(per_row, gate_sums, num_pairs, counts, options)
    if carrier is not None:
        out.loss = out.loss + carrier
    return out
