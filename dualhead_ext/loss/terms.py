# SPDX-License-Identifier: Apache-2.0
"""The terms of the training objective, one short function each, and the options that choose them.

A new regulariser or reduction is a function and an entry in its dict; `LossOptions` states each
option and default once. `totals` combines the terms. P pairs, N response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MIX_NAMES, PREFERENCE_NAMES, is_finite
from .pairs import Pairing, to_device

# A sigmoid within 1 % of 0 or 1 counts as saturated: |logit| > log 99.
SATURATION_LOGIT = math.log(99.0)

# --- the gate's regulariser ----------------------------------------------------------------------


def gate_entropy(gate_logit: Tensor) -> Tensor:
    """``H(a) = -a log a - (1-a) log(1-a)`` of ``a = sigmoid(l)``, for any shape. It is computed
    from the logit, ``-a logsigmoid(l) - (1-a) logsigmoid(-l)``, so a saturated a is exact.
    ``dH/dl = -l a (1-a)``. Infinite logits (a fixed a of 0 or 1) give 0 and no gradient.
    """
    fixed = torch.isinf(gate_logit)
    logit = gate_logit.masked_fill(fixed, 0.0)  # inf * 0 is kept out of the graph
    entropy = -torch.sigmoid(logit) * F.logsigmoid(logit)
    entropy = entropy - torch.sigmoid(-logit) * F.logsigmoid(-logit)
    return entropy.masked_fill(fixed, 0.0)


def maximize_entropy(entropy: Tensor) -> Tensor:
    """``-E_t[H(a_t)]``: lowest at a = 1/2, as the paper's text intends."""
    return -entropy


def minimize_entropy(entropy: Tensor) -> Tensor:
    """``-E_t[a log a + (1-a) log(1-a)] = +E_t[H(a_t)]``: the paper's formula as printed. It is
    lowest at a = 0 and a = 1, so it collapses the gate.
    """
    return entropy


def ignore_entropy(entropy: Tensor) -> Tensor:
    """0, for the ablation. It depends on the gate, since DDP waits for all gradients."""
    return 0.0 * entropy


# name: mean entropy -> L_gate / lambda_G
GATE_REGULARIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": maximize_entropy,
    "entropy_as_printed": minimize_entropy,
    "none": ignore_entropy,
}

# --- the language-model term ---------------------------------------------------------------------


def per_sequence(counts: LossCounts) -> Any:
    """``-E_{(x,y)} sum_t log P(y_t)``: sum over tokens, mean over sequences, as printed."""
    return counts.sequences


def per_token(counts: LossCounts) -> Any:
    """``-E_t log P(y_t)``: mean over all tokens of the term."""
    return counts.lm_tokens


# name: LossCounts -> the divisor of the summed term
LM_REDUCTIONS: dict[str, Callable[[LossCounts], Any]] = {"sum": per_sequence, "mean": per_token}

# --- the preference term -------------------------------------------------------------------------


def sum_log_probs(logps: Tensor, lengths: Tensor) -> Tensor:
    """``sum_t log pi_r(y_t)``, as printed. logps, lengths (P,)."""
    return logps


def mean_log_probs(logps: Tensor, lengths: Tensor) -> Tensor:
    """``(1/|y|) sum_t log pi_r(y_t)``, as in SimPO: independent of length. 0 if empty."""
    return logps / lengths.clamp(min=1).to(logps.dtype)


# name: (summed log-probabilities, lengths) -> log-probabilities of the margin
PREFERENCE_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": sum_log_probs,
    "mean": mean_log_probs,
}

# The distribution that "log_prob" compares: pi_r = softmax(f(z_RM)), or the mixture.
PREFERENCE_DISTRIBUTIONS = ("reward", "mixed")


def pair_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """``-(1-e) log sigmoid(m) - e log sigmoid(-m)`` with ``m = beta_r (s+ - s-) - gamma``. margin
    (P,), e = label_smoothing -> (P,).
    """
    loss = -F.logsigmoid(margin)
    if label_smoothing > 0.0:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    return loss


# --- options, counts, output ---------------------------------------------------------------------


# The error for an objective in which at most the entropy depends on alpha.
UNTAUGHT_GATE = (
    "the gate would learn nothing: with preference='token_reward' and pref_gate=0 no term but the "
    "entropy depends on it; use pref_gate=1, a kl_price, lm_on_chosen=True or gate='fixed'"
)


@dataclass(frozen=True)
class LossOptions:
    """The options of the objective. Defaults are the paper's where it gives a value.

    Args:
        mix: how the two heads are mixed, ``"logits"`` (default) or ``"probs"``.
        beta_r: factor of the preference margin. Default 0.1; the paper gives no value.
        lambda_r: weight of the preference term. Default 1.
        lambda_g: weight of the gate's term. Default 0.01.
        kl_price: eta, the weight of the KL penalty ``eta E_t[KL(pi_mix || pi_LM)]``. Default 0.
        reward_l2: weight of the squared token rewards, ``1/2 reward_l2 E_t[sum_k
            delta_t,k(y_t)^2]`` over all response tokens; for ``"token_reward"`` alone. Default 0.
            If the responses are the backbone's own samples, ``E_t[delta^2] / 2`` is to second order
            at least the KL at alpha = 1, and needs no product with the vocabulary.
        preference: the reward of a response. ``"log_prob"`` (default, the paper's): ``r(y) = sum_t
            log pi_r(y_t)``. ``"token_reward"``: ``r(y) = sum_t alpha_t^kappa delta_t(y_t)``, delta
            = z_RM - z_LM, which needs no product with the vocabulary.
        pref_gate: kappa of ``"token_reward"``, 0 (default) or 1. With 1 the gate learns from both
            responses.
        gate_regularizer: a name in `GATE_REGULARIZERS`. Default ``"entropy"``.
        lm_reduction: a name in `LM_REDUCTIONS`. Default ``"sum"``.
        pref_on: the distribution that ``"log_prob"`` compares: pi_r (``"reward"``, default) or the
            mixture (``"mixed"``), with which the gate learns from the rejected response too.
        pref_reduction: a name in `PREFERENCE_REDUCTIONS`. Default ``"sum"``.
        gamma: target margin, subtracted from the scaled margin. Default 0.
        label_smoothing: assumed share of pairs with the wrong label, in [0, 0.5). Default 0.
        lm_on_chosen: whether the language-model term trains on the chosen responses. Default True.
        logit_scale, logit_softcap: the backbone's f(z) = cap(scale z). Defaults 1 and 0 (no cap).

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type; the message names it.
    """

    mix: str = "logits"
    beta_r: float = 0.1
    lambda_r: float = 1.0
    lambda_g: float = 0.01
    kl_price: float = 0.0
    reward_l2: float = 0.0
    preference: str = "log_prob"
    pref_gate: int = 0
    gate_regularizer: str = "entropy"
    lm_reduction: str = "sum"
    pref_on: str = "reward"
    pref_reduction: str = "sum"
    gamma: float = 0.0
    label_smoothing: float = 0.0
    lm_on_chosen: bool = True
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        for name, names in (
            ("mix", MIX_NAMES),
            ("preference", PREFERENCE_NAMES),
            ("pref_gate", (0, 1)),
            ("gate_regularizer", GATE_REGULARIZERS),
            ("lm_reduction", LM_REDUCTIONS),
            ("pref_on", PREFERENCE_DISTRIBUTIONS),
            ("pref_reduction", PREFERENCE_REDUCTIONS),
        ):
            value = getattr(self, name)
            if value not in tuple(names):
                raise ValueError(
                    f"dual_head_loss: {name} must be one of {', '.join(map(str, names))}, "
                    f"got {value!r}"
                )
        if self.preference == "token_reward" and self.pref_on != "reward":
            raise ValueError(
                "dual_head_loss: pref_on must be 'reward' if preference is 'token_reward', "
                f"got {self.pref_on!r}"
            )
        self._check_number("beta_r", "a number > 0", lambda x: x > 0)
        for name in ("lambda_r", "lambda_g", "kl_price", "reward_l2", "gamma", "logit_softcap"):
            self._check_number(name, "a number >= 0", lambda x: x >= 0)
        if self.reward_l2 and self.preference != "token_reward":
            raise ValueError(
                "dual_head_loss: reward_l2 must be 0 if preference is not 'token_reward', "
                f"got {self.reward_l2!r}"
            )
        self._check_number("label_smoothing", "a number in [0, 0.5)", lambda x: 0 <= x < 0.5)
        self._check_number("logit_scale", "a number other than 0", lambda x: x != 0)
        if not isinstance(self.lm_on_chosen, bool):
            raise TypeError(
                f"dual_head_loss: lm_on_chosen must be a bool, got {self.lm_on_chosen!r}"
            )

    def teaches_gate(self, has_lm: bool) -> bool:
        """Whether a term other than the entropy depends on alpha. Always True for ``"log_prob"``.
        has_lm: whether the batch has rows in the language-model term.
        """
        taught = self.pref_gate == 1 or has_lm or self.kl_price > 0.0
        return self.preference == "log_prob" or taught

    def _check_number(self, name: str, expected: str, accept: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"dual_head_loss: {name} must be {expected}, got {value!r}")
        if not is_finite(value) or not accept(value):
            raise ValueError(f"dual_head_loss: {name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class LossCounts:
    """The divisors of the objective's means, as numbers or 0-d tensors. Counts of the parts of a
    batch add up to those of the whole; so do the losses of the parts, if each is divided by the
    counts of the whole.

    Args:
        sequences: rows in the language-model term, empty responses included.
        lm_tokens: their response tokens.
        pairs: P.
        tokens: all response tokens, for the terms of the gate and the KL.
    """

    sequences: Any
    lm_tokens: Any
    pairs: Any
    tokens: Any

    @classmethod
    def of_lengths(
        cls, lengths: Tensor, pairing: Pairing | None = None, lm_on_chosen: bool = True
    ) -> LossCounts:
        """The counts of a batch whose rows have ``lengths`` (R,) response tokens, computed on their
        device without a synchronisation. pairing: default [all chosen; all rejected].
        """
        pairing = Pairing(len(lengths)) if pairing is None else pairing
        in_lm = pairing.in_lm(lm_on_chosen)
        lm_tokens = (lengths * to_device(in_lm, lengths.device)).sum()
        return cls(sum(in_lm), lm_tokens, len(pairing), lengths.sum())

    def __add__(self, other: LossCounts) -> LossCounts:
        return LossCounts(
            self.sequences + other.sequences,
            self.lm_tokens + other.lm_tokens,
            self.pairs + other.pairs,
            self.tokens + other.tokens,
        )


def at_least_one(count: Any) -> Any:
    """``max(count, 1)``, the divisor of a mean: a number, or a 0-d tensor on any device."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


# The number of equal bins in the logged histogram of alpha.
ALPHA_BINS = 10

# Statistics of each token's alpha (`totals.gate_statistics`): moments, whether it is within 1 % of
# 0 or of 1, and its bin.
GATE_STATISTICS = (
    "alpha",
    "alpha_squared",
    "alpha_near_0",
    "alpha_near_1",
    *(f"alpha_bin_{i}" for i in range(ALPHA_BINS)),
)

# The columns of `DualHeadLossOutput.totals`: counts and sums of one example.
TOTAL_NAMES = (
    "sequences",
    "lm_tokens",
    "pairs",
    "tokens",
    "lm_nll",
    "pair_loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "correct_pairs",
    "saturated_pairs",
    "entropy",
    "kl",
    "reward_squares",
    *GATE_STATISTICS,
)


@dataclass
class DualHeadLossOutput:
    """The result of `functional.dual_head_loss`, fp32 (float64 for float64) unless noted.

    Args:
        loss: 0-d, differentiable: ``lm_loss + lambda_R preference_loss + gate_loss + kl_loss +
            l2_loss``.
        lm_loss, preference_loss, gate_loss, kl_loss, l2_loss: 0-d, detached. gate_loss includes
            lambda_G, kl_loss kl_price, l2_loss reward_l2.
        chosen_logps, rejected_logps: (P,), detached, r of the better and the worse response:
            ``sum_t log pi(y_t)`` of the distribution that the preference term compares, or the sum
            of token rewards.
        chosen_rewards, rejected_rewards: (P,), detached, beta_r times the (reduced) r. Their
            difference minus gamma is the margin.
        totals: (E, len(TOTAL_NAMES)) float64, detached: counts and sums, one row for each example
            (`Pairing.examples`). They add up over examples, batches and processes;
            `metrics_of_totals` turns their sum into means.
    """

    loss: Tensor
    lm_loss: Tensor
    preference_loss: Tensor
    gate_loss: Tensor
    kl_loss: Tensor
    l2_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    totals: Tensor


def metrics_of_totals(totals: Tensor, options: LossOptions) -> dict[str, float]:
    """Means for a log, named as in TRL, from the sum of `DualHeadLossOutput.totals` over examples,
    (len(TOTAL_NAMES),).

    - ``loss, lm_loss, preference_loss, gate_loss``; with a kl_price also ``kl_loss`` and ``kl``
      (nats per token), with a reward_l2 also ``l2_loss``;
    - ``rewards/chosen|rejected|accuracies|margins``, ``logps/chosen|rejected``;
    - ``preference/saturation``: share of pairs whose sigmoid is within 1 % of 0 or 1;
    - ``gate/mean|std|entropy``; ``gate/below_0.01|above_0.99``: shares of the tokens;
      ``gate/saturation``: their sum;
    - ``gate/histogram/0.0-0.1`` to ``0.9-1.0``: shares of the tokens in ten bins.

    Groups without pairs or tokens are left out.
    """
    t = dict(zip(TOTAL_NAMES, totals.tolist(), strict=True))
    counts = LossCounts(t["sequences"], t["lm_tokens"], t["pairs"], t["tokens"])
    metrics = {"loss": 0.0}
    lm_count = LM_REDUCTIONS[options.lm_reduction](counts)
    if lm_count:
        metrics["lm_loss"] = t["lm_nll"] / lm_count
        metrics["loss"] += metrics["lm_loss"]
    if t["pairs"]:
        metrics["preference_loss"] = t["pair_loss"] / t["pairs"]
        metrics["loss"] += options.lambda_r * metrics["preference_loss"]
        metrics["rewards/chosen"] = t["chosen_rewards"] / t["pairs"]
        metrics["rewards/rejected"] = t["rejected_rewards"] / t["pairs"]
        metrics["rewards/accuracies"] = t["correct_pairs"] / t["pairs"]
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["logps/chosen"] = t["chosen_logps"] / t["pairs"]
        metrics["logps/rejected"] = t["rejected_logps"] / t["pairs"]
        metrics["preference/saturation"] = t["saturated_pairs"] / t["pairs"]
    if t["tokens"]:
        if options.kl_price:
            metrics["kl"] = t["kl"] / t["tokens"]
            metrics["kl_loss"] = options.kl_price * metrics["kl"]
            metrics["loss"] += metrics["kl_loss"]
        if options.reward_l2:
            metrics["l2_loss"] = options.reward_l2 / 2 * t["reward_squares"] / t["tokens"]
            metrics["loss"] += metrics["l2_loss"]
        mean, entropy = t["alpha"] / t["tokens"], t["entropy"] / t["tokens"]
        mean_entropy = torch.tensor(entropy, dtype=torch.float64)
        regularizer = GATE_REGULARIZERS[options.gate_regularizer]
        metrics["gate_loss"] = options.lambda_g * float(regularizer(mean_entropy))
        metrics["loss"] += metrics["gate_loss"]
        metrics["gate/mean"] = mean
        variance = t["alpha_squared"] / t["tokens"] - mean * mean
        metrics["gate/std"] = math.sqrt(max(variance, 0.0))
        metrics["gate/entropy"] = entropy
        metrics["gate/below_0.01"] = t["alpha_near_0"] / t["tokens"]
        metrics["gate/above_0.99"] = t["alpha_near_1"] / t["tokens"]
        metrics["gate/saturation"] = metrics["gate/below_0.01"] + metrics["gate/above_0.99"]
        for i in range(ALPHA_BINS):
            share = t[f"alpha_bin_{i}"] / t["tokens"]
            metrics[f"gate/histogram/{i / ALPHA_BINS:.1f}-{(i + 1) / ALPHA_BINS:.1f}"] = share
    return metrics
