# SPDX-License-Identifier: Apache-2.0
"""The objective without N x V logits: `reference.dual_head_loss`, one chunk of tokens at a time.

The gradient of a pair's loss needs only the sums over that pair's own tokens. So a chunk holds
whole pairs: products into a workspace, log-probabilities, sums, the preference coefficient, then
the logits' gradients in place, dW and d(gate logit). Only a pair that is too long for the workspace
is computed twice. Gradients are computed in forward and scaled in backward. Response tokens are
gathered first; z_LM is computed only if the mixture needs it. Where nothing else reads z_LM or
delta, the mixture of a correction is one sum of products, ``z_LM + sum_k w_k (alpha delta_k)``.

Everything that determines sizes and chunks (lengths, objectives, their weights) is on the host, so
nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.logits import accumulator_dtype
from . import rows as loss_rows
from .heads import Heads
from .pairs import Pairing
from .products import Job, Linear, Product, Products, Terms, Tokens, lay_out
from .terms import (
    LM_REDUCTIONS,
    PREFERENCE_REDUCTIONS,
    DualHeadLossOutput,
    LossCounts,
    LossOptions,
    at_least_one,
    gate_entropy,
    pair_loss,
)
from .token_rewards import refuse_second_derivative, token_rewards
from .totals import RowSums, combine, gate_statistics

# Bytes of a chunk's logits: 512 rows at V = 32000 in fp32. Half of it is 15 % slower (more passes
# over dW); twice as much gains nothing.
WORKSPACE_BYTES = 64 << 20

# (whether the mixture's logits are needed, the objective whose rewards are, whether in L_LM) ->
# rows of the batch.
Plan = dict[tuple[bool, "int | None", bool], list[int]]
# Jobs with their rows, and the products that they share.
Computed = tuple[list[tuple[Job, loss_rows.Rows]], list[Product]]


def on_device(x: Tensor) -> bool:
    """Whether the host would have to wait to read x."""
    return x.device.type != "cpu"


class Maps:
    """The linear maps that compute logits, and the gradients of their inputs.

    Args:
        inputs: `_INPUTS` by name, detached. reward_features: (K, N, m), the features of a
            correction, times alpha if it is `summed`; None for a full head, which reads the hidden
            states.
        heads: their kind, and the weights of the objectives.
        wanted: whether the gradient of each input is needed.
    """

    def __init__(
        self, inputs: dict[str, Tensor | None], heads: Heads, wanted: dict[str, bool]
    ) -> None:
        self.dtype = accumulator_dtype(inputs["hidden"].dtype)
        self.grads = {
            name: torch.zeros(x.shape, dtype=self.dtype, device=x.device)
            if x is not None and wanted[name]
            else None
            for name, x in inputs.items()
            if name != "gate_logit"
        }
        self.lm = self._linear(inputs, "lm_weight", "lm_bias", "hidden")
        corrects = heads.reward_head != "full"
        weight = "lm_weight" if heads.reward_head == "embedding" else "reward_weight"
        features = "reward_features" if corrects else "hidden"
        self.objectives = [
            self._linear(inputs, weight, "reward_bias", features, k)
            for k in range(heads.num_objectives)
        ]
        self._base: Terms = ((self.lm, 1.0),) if corrects else ()
        self.mixture = self._base + tuple(zip(self.objectives, heads.shares(), strict=True))
        # Whether the mixture's z_RM is that of the only objective.
        self.one = self.mixture == self.objective(0) and len(self.objectives) == 1

    def objective(self, k: int) -> Terms:
        """The terms of z_k."""
        return (*self._base, (self.objectives[k], 1.0))

    def _linear(
        self,
        inputs: dict[str, Tensor | None],
        weight: str,
        bias: str,
        features: str,
        k: int | None = None,
    ) -> Linear:
        """A linear map over these inputs; of those with a first dimension K, the k-th part."""

        def part(name: str, of: dict[str, Tensor | None]) -> Tensor | None:
            x = of.get(name)
            return x[k] if x is not None and name.startswith("reward") else x

        named = [(name, of) for of in (inputs, self.grads) for name in (weight, bias, features)]
        return Linear(*(part(name, of) for name, of in named))


class Pass:
    """One pass over a batch: :meth:`run` computes the sums of rows and, if wanted, the gradients.
    known_lengths: the lengths, on the host. summed: see `is_summed`. impl: see
    `rows.log_probabilities`.
    """

    def __init__(
        self,
        tokens: Tokens,
        lengths: Tensor,
        known_lengths: list[int],
        maps: Maps,
        options: LossOptions,
        pairing: Pairing,
        counts: LossCounts,
        wanted: dict[str, bool],
        summed: bool,
        impl: str | None,
    ) -> None:
        self.impl, self.summed = impl, summed
        self.tokens, self.lengths, self.options = tokens, lengths, options
        self.pairing, self.counts, self.maps = pairing, counts, maps
        device = tokens.hidden.device
        self.products = Products(device, maps.dtype)
        self.needs_gradients = any(wanted.values())
        self.lm_nll = torch.zeros(len(lengths), dtype=maps.dtype, device=device)
        self.kl = torch.zeros_like(self.lm_nll)
        self.rewards = self.lm_nll.new_zeros(len(lengths), len(maps.objectives))
        self.gate_grad = torch.zeros_like(tokens.gate_logit) if wanted["gate_logit"] else None
        self._known, self._longest = known_lengths, max(known_lengths)
        self._starts = [0, *accumulate(known_lengths)]
        self._in_lm = pairing.in_lm(options.lm_on_chosen)
        self._compares = options.preference == "log_prob"
        vocab = maps.lm.weight.shape[0]
        # At least two rows: a token's z_LM and z_RM. At most two rows for each job of a token: the
        # mixture and each objective.
        self._budget = max(2, WORKSPACE_BYTES // (vocab * self.lm_nll.element_size()))
        rows = min(self._budget, 2 * (1 + len(maps.objectives)) * len(tokens.rows))
        self._workspace = torch.empty(rows, vocab, dtype=maps.dtype, device=device)
        self._lm_count = at_least_one(LM_REDUCTIONS[options.lm_reduction](counts))

    # --- chunks ---

    def _plan(self, rows: list[int], pairs: list[int]) -> Plan:
        """The plan of these rows and their pairs."""
        of_pairs: dict[int, set[int]] = {}  # objective -> rows whose rewards are needed
        if self._compares:
            pairing = self.pairing
            for pair in pairs:
                compared = of_pairs.setdefault(pairing.objective[pair], set())
                compared.update((pairing.better[pair], pairing.worse[pair]))
        plan: Plan = {}
        for row in rows:
            objectives = [k for k, compared in of_pairs.items() if row in compared]
            if self._in_lm[row] or self.options.kl_price > 0.0:
                # One product for both terms if they read the same logits.
                k = objectives.pop() if self.maps.one and objectives else None
                plan.setdefault((True, k, self._in_lm[row]), []).append(row)
            for k in objectives:
                plan.setdefault((False, k, False), []).append(row)
        return plan

    def _rows_of_logits(self, plan: Plan) -> int:
        both = self.options.pref_on == "mixed"
        return sum(
            sum(self._known[row] for row in rows)
            * (2 if both or (mixture and not self.summed) else 1)
            for (mixture, _, _), rows in plan.items()
        )

    def _jobs(self, plan: Plan) -> list[Job]:
        made, mixed = [], self.options.pref_on == "mixed"
        for (mixture, k, in_lm), rows in plan.items():
            job = Job(
                self._tokens_of(rows),
                ((self.maps.lm, 1.0),) if mixed or (mixture and not self.summed) else None,
                self.maps.mixture if mixture else self.maps.objective(k),
                in_lm,
                k,
                mixed,
                mixture and self.options.kl_price > 0.0,
            )
            made.append(job)
        return [job for job in made if len(job.index)]

    def _tokens_of(self, rows: list[int]) -> Tensor:
        """The indices (n,) of the tokens of these rows, in order."""
        spans: list[list[int]] = []
        for row in rows:
            start, end = self._starts[row], self._starts[row + 1]
            if spans and spans[-1][1] == start:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        device = self.tokens.rows.device
        return torch.cat([torch.arange(*span, device=device) for span in spans])

    def _chunks(self) -> Iterator[tuple[list[Job], list[int]]]:
        """(jobs, their pairs) of as many examples as fit into the workspace, at least one."""
        examples, of_example = self.pairing.examples, self.pairing.pairs_of_examples
        first = 0
        while first < len(examples):
            last, plan = first, {}
            rows: list[int] = []
            pairs: list[int] = []
            while last < len(examples):
                more = self._plan(rows + examples[last], pairs + of_example[last])
                if last > first and self._rows_of_logits(more) > self._budget:
                    break
                plan, rows, pairs = more, rows + examples[last], pairs + of_example[last]
                last += 1
            if jobs := self._jobs(plan):
                yield jobs, pairs
            first = last

    def _pieces(self, job: Job) -> Iterator[Job]:
        """Parts of a job that each fit into the workspace."""
        size = max(1, self._budget // (1 if job.lm is None else 2))
        for index in job.index.split(size):
            yield replace(job, index=index)

    # --- computation ---

    def run(self) -> None:
        """Compute all chunks."""
        for jobs, pairs in self._chunks():
            if sum(job.rows for job in jobs) <= self._budget:
                computed = self._log_probabilities(jobs)
                self._gradients(computed, self._pair_coefficients(pairs))
                continue
            # Too long for the workspace: one pass for the sums, another for the gradients.
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
                mixed=job.needs_mixed,
                reward=job.needs_reward,
                impl=self.impl,
            )
            held.append((job, rows))
            if record:
                self._record(job, rows)
        return held, products

    def _record(self, job: Job, rows: loss_rows.Rows) -> None:
        if job.in_lm:
            self.lm_nll -= self._row_sums(job.index, rows.reward if job.summed else rows.mixed)
        if job.objective is not None:
            found = rows.mixed if job.pairs_mixed else rows.reward
            self.rewards[:, job.objective] += self._row_sums(job.index, found)
        if job.in_kl:
            self.kl += self._row_sums(job.index, loss_rows.kl(rows))

    def _row_sums(self, index: Tensor, of_tokens: Tensor) -> Tensor:
        """Sums (R,) in a fixed order, which index_add_ does not have on CUDA."""
        of_row = self.tokens.rows[index]
        column = index - (self.lengths.cumsum(0) - self.lengths)[of_row]
        dense = of_tokens.new_zeros(len(self.lengths), self._longest)
        return dense.index_put_((of_row, column), of_tokens).sum(-1)

    def _pair_coefficients(self, pairs: list[int]) -> Tensor:
        """dL / d rewards (R, K) from these pairs; 0 elsewhere."""
        out = torch.zeros_like(self.rewards)
        if not pairs or not self.needs_gradients or not self._compares:
            return out
        pairing, options = self.pairing, self.options
        better, worse, objective = pairing.tensors(out.device, pairs)
        reduce = PREFERENCE_REDUCTIONS[options.pref_reduction]
        with torch.enable_grad():
            rewards = self.rewards.detach().requires_grad_()
            chosen, rejected = (
                options.beta_r * reduce(rewards[rows, objective], self.lengths[rows])
                for rows in (better, worse)
            )
            losses = pair_loss(chosen - rejected - options.gamma, options.label_smoothing)
            empty = self.lengths[better] + self.lengths[worse] == 0
            losses = losses.masked_fill(empty, 0.0)
            total = options.lambda_r * losses.sum() / at_least_one(self.counts.pairs)
            return torch.autograd.grad(total, rewards)[0]

    def _gradients(self, computed: Computed, of_rewards: Tensor) -> None:
        if not self.needs_gradients:
            return
        held, products = computed
        for job, rows in held:
            self._logit_gradients(job, rows, of_rewards)
        for product in products:
            if product.base and self.maps.lm.trains:
                self.products.pass_to_base(product)
        for product in products:
            if product.trains:
                self.products.accumulate(product)

    def _logit_gradients(self, job: Job, rows: loss_rows.Rows, of_rewards: Tensor) -> None:
        """Replace a job's logits by their gradients, and add to the gate's gradient."""
        mixed = torch.zeros_like(rows.gate_logit)
        pair = None
        if job.objective is not None:
            pair = of_rewards[self.tokens.rows[job.index], job.objective]
        if job.in_lm:
            mixed = (mixed - 1.0) / self._lm_count
        if job.summed:
            mixed, pair = torch.zeros_like(mixed), mixed
        if pair is not None and job.pairs_mixed:
            mixed, pair = mixed + pair, None
        of_kl = None
        if job.in_kl:
            # Divided in the precision of the loss: the count may have another dtype.
            of_kl = torch.full_like(mixed, self.options.kl_price) / at_least_one(self.counts.tokens)
        gate = loss_rows.gradients_(rows, mixed, pair, of_kl, lm=self.maps.lm.trains)
        if gate is not None and self.gate_grad is not None:
            self.gate_grad.index_add_(0, job.index, gate.to(self.gate_grad.dtype))


# The inputs of the logits, as inputs of one autograd function. reward_features: see `Maps`.
_INPUTS = (
    "hidden",
    "gate_logit",
    "lm_weight",
    "lm_bias",
    "reward_weight",
    "reward_bias",
    "reward_features",
)


class _Carrier(torch.autograd.Function):
    """Returns a zero whose gradient is that of all terms that need logits."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[dict[str, bool]], Pass], *inputs: Tensor | None) -> tuple:
        ctx.run, ctx.wanted = run, dict(zip(_INPUTS, ctx.needs_input_grad[1:], strict=True))
        result = run(ctx.wanted)
        ctx.gradients = _gradients_of(result)
        ctx.likes = [None if x is None else (x.shape, x.dtype) for x in inputs]
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(result.lm_nll, result.rewards, result.kl)
        return inputs[1].new_zeros(()), result.lm_nll, result.rewards, result.kl

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *unused: Any) -> tuple:
        refuse_second_derivative()
        # Scaled in place and released, so that autograd uses them as .grad without a copy. A second
        # backward over a retained graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _ = ctx.saved_tensors  # raises if the graph was freed or an input has changed
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
    """The gradient of each of `_INPUTS`; None if it is not needed."""
    grads = result.maps.grads | {"gate_logit": result.gate_grad}
    return [grads[name] for name in _INPUTS]


def dual_head_loss(
    hidden: Tensor,
    labels: Tensor,
    mask: Tensor,
    gate_logit: Tensor,
    heads: Heads,
    options: LossOptions,
    pairing: Pairing,
    counts: LossCounts | None = None,
    lengths: list[int] | None = None,
    impl: str | None = None,
) -> DualHeadLossOutput:
    """As :func:`dualhead_ext.loss.reference.dual_head_loss`, over checked arguments. It waits for a
    device only if lengths are not given or heads.objective_weights are there. impl: see
    :func:`dualhead_ext.loss.rows.log_probabilities`.
    """
    counted = mask.bool().sum(-1)
    if lengths is None:
        lengths = counted.tolist()
    rows, columns = torch.nonzero_static(mask.bool(), size=sum(lengths)).unbind(-1)
    if counts is None:
        counts = LossCounts.of_lengths(counted, pairing, options.lm_on_chosen)
    picked_gate, picked_labels = gate_logit[rows, columns], labels[rows, columns].long()

    def sums(of_tokens: Tensor) -> Tensor:
        dense = of_tokens.new_zeros(mask.shape)
        return dense.index_put((rows, columns), of_tokens).sum(-1)

    rewards = carrier = None
    zero = torch.zeros(len(lengths), dtype=accumulator_dtype(hidden.dtype), device=hidden.device)
    lm_nll = kl = squares = zero
    # `Products` applies autocast itself; nothing else may be cast.
    with torch.autocast(hidden.device.type, enabled=False):
        if options.preference == "token_reward":
            of_tokens = token_rewards(hidden, (rows, columns), picked_labels, heads)
            if options.reward_l2:
                squares = sums(of_tokens.square().sum(0))
            if options.pref_gate:
                of_tokens = of_tokens * torch.sigmoid(picked_gate)
            rewards = torch.stack([sums(of_objective) for of_objective in of_tokens], -1)
    needs_logits = rewards is None or options.kl_price > 0.0
    if needs_logits or any(pairing.in_lm(options.lm_on_chosen)):
        picked = hidden[rows, columns]
        summed = is_summed(heads, options)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = _inputs(picked, picked_gate, heads, summed)

        def run(wanted: dict[str, bool]) -> Pass:
            held = {name: None if x is None else x.detach() for name, x in inputs.items()}
            tokens = Tokens(rows, picked_labels, held["gate_logit"], held["hidden"])
            maps = Maps(held, heads, wanted)
            work = Pass(
                tokens, counted, lengths, maps, options, pairing, counts, wanted, summed, impl
            )
            with torch.autocast(hidden.device.type, enabled=False):
                work.run()
            return work

        if torch.is_grad_enabled():
            carrier, lm_nll, log_probs, kl = _Carrier.apply(run, *inputs.values())
        else:
            done = run(dict.fromkeys(_INPUTS, False))
            lm_nll, log_probs, kl = done.lm_nll, done.rewards, done.kl
        rewards = log_probs if rewards is None else rewards
    per_row = RowSums(lm_nll, rewards, sums(gate_entropy(picked_gate)), kl, squares, counted)
    gate_sums = {name: sums(x) for name, x in gate_statistics(picked_gate).items()}
    out = combine(per_row, gate_sums, pairing, counts, options)
    if carrier is not None:
        out.loss = out.loss + carrier
    return out


def is_summed(heads: Heads, options: LossOptions) -> bool:
    """Whether the mixture's logits are computed as one sum of products: alpha multiplies the
    features of a correction, and no term reads z_LM or delta alone.
    """
    corrects = heads.reward_head != "full" and options.mix == "logits"
    return corrects and options.preference == "token_reward" and options.kl_price == 0.0


def _inputs(
    hidden: Tensor, gate_logit: Tensor, heads: Heads, summed: bool
) -> dict[str, Tensor | None]:
    """`_INPUTS` by name. summed: see `is_summed`."""
    weight, bias, features = heads.reward_weight, heads.reward_bias, None
    if heads.reward_head != "full":
        weight, features = heads.reward_up, heads.features(hidden)
    if heads.reward_head == "embedding":
        weight = bias = None  # the matrix is the LM head's, and the features include the bias
    if summed:
        if bias is not None:  # as one more column, which alpha multiplies too
            weight = torch.cat((weight, bias.to(weight.dtype)[..., None]), -1)
            features, bias = F.pad(features, (0, 1), value=1.0), None
        features = torch.sigmoid(gate_logit)[:, None] * features
    values = (hidden, gate_logit, heads.lm_weight, heads.lm_bias, weight, bias, features)
    return dict(zip(_INPUTS, values, strict=True))
