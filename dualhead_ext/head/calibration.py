# SPDX-License-Identifier: Apache-2.0
"""Calibration of the strength. Afterwards ``strength=1`` is a mean KL from the backbone of
`TARGET_KL` nats per token, and the config holds the curve of KL over strength.

Calibration scales delta: up map and bias of a correction, ``W_RM <- W_LM + s (W_RM - W_LM)`` of a
full reward head. A first scale is found on given hidden states. The gated model did
not write their text, and the KL of its own text differs. So the model then decodes requests at
several strengths, the KL of that text is measured, and a curve through the points corrects the
scale.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .controls import Controls
from .kl_cap import kl_from_backbone
from .mixture import mixing_weight

TARGET_KL = 0.1
# The decoded requests: their number, their length, and the strengths they take in turn.
REQUESTS, NEW_TOKENS = 36, 24
STRENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.6)
# The number of hidden states for the first scale, and of the scales that are tried at most.
STATES, EVALUATIONS = 256, 64
# The strengths of the stored curve.
GRID = tuple(i / 4 for i in range(0, 11))

logger = logging.getLogger(__name__)


@torch.no_grad()
def scale_reward(head: Any, factor: float) -> None:
    """Multiply delta of every objective by ``factor``, in place."""
    reward = head.reward_head
    if reward.kind != "full":
        for parameter in (None if reward.up is None else reward.up.weight, reward.bias):
            if parameter is not None:
                parameter.mul_(factor)
        return
    for parameter, start in ((reward.weight, head.lm_weight), (reward.bias, head.lm_bias)):
        if parameter is not None:
            start = start.to(parameter.dtype)
            parameter.sub_(start).mul_(factor).add_(start)


@torch.no_grad()
def mean_kl(head: Any, hidden: Tensor, gate_logit: Tensor, strength: Any = 1.0) -> Tensor:
    """``KL(pi_mix || pi_LM)`` in nats at each hidden state: hidden (N, d), gate_logit (N,),
    strength a number or (N,) -> (N,).
    """
    states = _States(head, hidden, gate_logit)
    return states.kl(1.0, torch.as_tensor(strength, dtype=gate_logit.dtype).expand(len(hidden)))


class _States:
    """Hidden states, and the KL there at any scale of delta."""

    ROWS = 64  # at a time, since the KL makes several copies of the logits

    def __init__(self, head: Any, hidden: Tensor, gate_logit: Tensor) -> None:
        config = head.config
        self.mix = config.mix
        self._post = (config.logit_scale, config.logit_softcap)
        self.head, self.hidden, self.gate_logit = head, hidden, gate_logit
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def keep_logits(self) -> None:
        """Compute the logits now and keep them: for several scales over few states."""
        self._kept = [self._logits(hidden) for hidden in self.hidden.split(self.ROWS)]

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(z_LM, delta), each (n, V)."""
        z_lm = self.head.lm_logits(hidden[:, None])
        delta = self.head.reward_logits(hidden[:, None], z_lm, None) - z_lm
        return z_lm[:, 0], delta[:, 0]

    def kl(self, scale: float, strength: Tensor) -> Tensor:
        """The KL (N,) with ``scale`` times delta, at strengths (N,)."""
        controls = Controls(strength=strength.to(self.gate_logit.device))
        _, alpha = mixing_weight(self.gate_logit, controls, self.mix)
        found = []
        parts = zip(self.hidden.split(self.ROWS), alpha.split(self.ROWS), strict=True)
        for i, (hidden, of_rows) in enumerate(parts):
            z_lm, delta = self._kept[i] if self._kept else self._logits(hidden)
            post = (self.mix, *self._post)
            found.append(kl_from_backbone(z_lm, z_lm + scale * delta, of_rows, *post))
        return torch.cat(found).to(self.gate_logit.dtype)

    def scale_for(self, target: float) -> float:
        """The scale of delta at which the mean KL at strength 1 is ``target``, to one part in a
        thousand. A secant of log KL over log scale, kept between a scale that gives too little and
        one that gives too much.

        Raises:
            ValueError: no scale reaches the target, because delta is 0, or because alpha is too
                small in the probability mix.
        """
        ones = torch.ones(len(self.hidden))
        low, high, scale = 0.0, math.inf, 1.0
        power, last = 2.0, (0.0, 0.0)  # KL grows as scale^power; the last (scale, KL)
        for _ in range(EVALUATIONS):
            kl = float(self.kl(scale, ones).mean())
            if abs(kl / target - 1) < 1e-3 or high - low < 1e-3 * scale:
                return scale
            low, high = (scale, high) if kl < target else (low, scale)
            if 0 < kl < math.inf and 0 < last[1] < math.inf and kl != last[1]:
                power = math.log(kl / last[1]) / math.log(scale / last[0])
            last = (scale, kl)
            step = (target / kl) ** (1 / max(power, 0.5)) if 0 < kl < math.inf else 0.0
            scale *= step
            if high == math.inf:  # not bracketed yet: at least twice as far each time
                scale = max(scale, 2 * low)
            elif not low < scale < high:
                scale = math.sqrt(low * high) if low > 0 else high / 16
            if scale > 2.0**40:
                raise ValueError(
                    f"calibrate: no scale of the reward gives a mean KL of {target} nats: the "
                    "reward is zero, or alpha is too small"
                )
        return scale


@torch.no_grad()
def calibrate(
    model: Any,
    hidden: Tensor,
    gate_logit: Tensor,
    prompts: Sequence[Sequence[int]],
    target: float = TARGET_KL,
    seed: int = 0,
) -> list[list[float]]:
    """Scale the reward of a gated model so that at strength 1 the text that it decodes has a mean
    KL of ``target`` nats per token from the backbone. Store the curve in its config.

    Args:
        model: a :class:`dualhead_ext.DualHeadForCausalLM`.
        hidden, gate_logit: (N, d), (N,), hidden states of held-out responses.
        prompts: token ids of held-out prompts, which the model continues.
        target: nats per token. Default `TARGET_KL`.
        seed: seed of sampling. The global random state is restored afterwards. Default 0.
    Returns:
        the curve, points [strength, KL] from [0, 0] on.
    Raises:
        ValueError: no prompt, no hidden state, or no scale that reaches the target.
    """
    if not len(hidden) or not len(prompts):
        raise ValueError(
            f"calibrate: expected states and prompts, got {len(hidden)} and {len(prompts)}"
        )
    head = model.lm_head_module
    head.config.kl_curve = None
    picked = torch.linspace(0, len(hidden) - 1, min(STATES, len(hidden))).long().unique()
    states = _States(head, hidden[picked], gate_logit[picked])
    states.keep_logits()  # of the reward as it is now; all scales below refer to it
    off_policy = states.scale_for(target)
    scale_reward(head, off_policy)
    curve = _decoded_curve(model, prompts, seed)
    decoded = curve(1.0)
    if head.config.mix == "logits":
        # In the logits mix, scaling delta and changing the strength are the same.
        factor = _inverse(curve, target)
        scale_reward(head, factor)
        measured = [[s, curve(s * factor)] for s in GRID]
    else:
        factor = states.scale_for(target * target / decoded) / off_policy
        scale_reward(head, factor)
        curve = _decoded_curve(model, prompts, seed + 1)
        measured = [[s, curve(s)] for s in GRID]
    logger.info(
        "calibrated: %.3g nats per token at strength 1 on given states, %.3g on decoded text; "
        "reward scaled by %.4g in all",
        target,
        decoded,
        off_policy * factor,
    )
    head.config.kl_curve = _rising(measured)
    return head.config.kl_curve


def _rising(points: list[list[float]]) -> list[list[float]]:
    """The points before the first that does not rise. In the probability mix alpha is at most 1."""
    kept = [[0.0, 0.0]]
    for strength, kl in points[1:]:
        if not kl > kept[-1][1]:
            break
        kept.append([float(strength), float(kl)])
    return kept


def _inverse(curve: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    while curve(high) < target:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(middle) < target else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def _decoded_curve(
    model: Any, prompts: Sequence[Sequence[int]], seed: int
) -> Callable[[float], float]:
    """KL as a function of strength s, fitted to measurements on sampled text: ``log KL`` is a
    parabola in ``log s``. Below the measured strengths KL grows as s^2, as it does near s = 0.
    """
    count = max(REQUESTS, len(STRENGTHS))
    requests = [list(prompts[i % len(prompts)]) for i in range(count)]
    # If there are few prompts, each is decoded at several strengths.
    shift = [(i + i // len(prompts)) % len(STRENGTHS) for i in range(count)]
    strength = torch.tensor([STRENGTHS[i] for i in shift])
    kl, rows = decoded_kl(model, sample(model, requests, strength, seed), strength)
    log_s = strength.log().double()
    sums = torch.zeros(len(STRENGTHS), 2, dtype=torch.float64)
    index = torch.tensor(shift)[rows.cpu()]
    sums.index_add_(0, index, torch.stack((kl.double().cpu(), torch.ones(len(kl))), -1).double())
    means = sums[:, 0] / sums[:, 1].clamp(min=1)
    seen = (sums[:, 1] > 0) & (means > 0)
    log_s = torch.tensor(STRENGTHS, dtype=torch.float64).log()[seen]
    design = torch.stack([log_s**power for power in range(3)], -1)
    weight = sums[seen, 1].sqrt()[:, None]
    found = torch.linalg.lstsq(weight * design, weight * means[seen, None].log()).solution[:, 0]
    level, slope, bend = found.tolist()
    first = math.log(STRENGTHS[0])

    def curve(s: float) -> float:
        if s <= 0:
            return 0.0
        x = math.log(s)
        if x >= first:
            return math.exp(level + slope * x + bend * x * x)
        # Below the measured strengths: KL is proportional to s^2.
        return math.exp(level + slope * first + bend * first * first + 2 * (x - first))

    return curve


@dataclass(frozen=True)
class Sampled:
    """Continuations of prompts, and what the heads read while they were written.

    Attributes:
        texts: the new tokens of each, at most N.
        hidden: (B, T + N - 1, d), the hidden states of the prompts, padded on the left to T tokens,
            and of all new tokens but the last.
        mask: (B, T + N - 1), 1 from a prompt's first token on.
        columns: T.
    """

    texts: list[list[int]]
    hidden: Tensor
    mask: Tensor
    columns: int


@torch.no_grad()
def sample(model: Any, prompts: Sequence[Sequence[int]], strength: Tensor, seed: int) -> Sampled:
    """Continuations of prompts, sampled at temperature 1 at strengths (B,)."""
    device = model.device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    mask = mask.to(device)
    eos = model.generation_config.eos_token_id
    stops = {eos} if isinstance(eos, int) else set(eos or ())
    training = model.training
    model.eval()
    read: list[Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _, args, out: read.append(out[0]))
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask, strength=strength.to(device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS,
                num_beams=1, num_return_sequences=1, pad_token_id=min(stops, default=0),
                synced_gpus=False,  # processes that share the model all decode the same
            )  # fmt: skip
    finally:
        hook.remove()
        model.train(training)
    texts = []
    for row in out[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        texts.append(row[:end])
    hidden = torch.cat(read, 1)[:, : out.shape[1] - 1]
    new = mask.new_ones(len(prompts), hidden.shape[1] - longest)
    return Sampled(texts, hidden, torch.cat((mask, new), 1), longest)


@torch.no_grad()
def decoded_kl(model: Any, sampled: Sampled, strength: Tensor) -> tuple[Tensor, Tensor]:
    """The KL from the backbone at each of the N tokens that were sampled at strengths (B,):
    (KL (N,), row of each token (N,)).
    """
    head, hidden = model.lm_head_module, sampled.hidden
    chosen = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    first = sampled.columns - 1  # the prompt's last token gives the first new one
    for row, text in enumerate(sampled.texts):
        chosen[row, first : first + len(text)] = True
    gate_logit = head.gate(hidden, sampled.mask)
    at = chosen.nonzero(as_tuple=True)
    return mean_kl(head, hidden[at], gate_logit[at], strength[at[0]]), at[0]


def strength_of_kl(curve: list[list[float]] | None, kl: Any) -> Any:
    """The strength at which a calibrated model has a mean KL of ``kl`` nats per token from its
    backbone. kl: a number, or a list or tensor of numbers. Between the points of the curve, the
    square root of KL is linear in the strength.

    Raises:
        ValueError: no curve, or a KL beyond its end. TypeError: not a number.
    """
    if isinstance(kl, (list, tuple, Tensor)):
        numbers = kl.tolist() if isinstance(kl, Tensor) else list(kl)
        return strength_of_kl(curve, numbers) if not isinstance(numbers, list) else [
            strength_of_kl(curve, number) for number in numbers
        ]  # fmt: skip
    if isinstance(kl, bool) or not isinstance(kl, (int, float)):
        raise TypeError(f"generate: kl must be a number of nats per token, got {kl!r}")
    if curve is None:
        raise ValueError(
            "generate: kl needs calibrated heads: train them with calibrate=True, or give strength "
            "instead"
        )
    if not 0.0 <= kl <= curve[-1][1]:
        raise ValueError(
            f"generate: kl must be in [0, {curve[-1][1]:.3g}] nats per token, the range that was "
            f"measured, got {kl!r}"
        )
    for (s0, kl0), (s1, kl1) in pairwise(curve):
        if kl <= kl1:
            low, high = math.sqrt(kl0), math.sqrt(kl1)
            return s0 + (s1 - s0) * (math.sqrt(kl) - low) / (high - low)
    return curve[-1][0]
