# SPDX-License-Identifier: Apache-2.0
"""The summary of a training run: figures and replies before and after, and warnings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data import score_pairs
from ..eval.heads.sweep import Reply, sample_replies
from ..eval.metrics import longer_is_better, wilson_interval
from ..eval.sampling import encode_prompts, prompt_text
from ..train.trainer import COLLAPSED_SHARE, DualHeadTrainer
from .terminal import accuracy_line, percent, printable

REPLIES, NEW_TOKENS = 3, 40
# The number of hidden states on which the mixture is measured before and after.
_STATES = 256
# Below this KL, in nats per token, the text cannot be told from the backbone's.
_NOTHING = 1e-3


@dataclass(frozen=True)
class Figures:
    """Figures of the heads on held-out rows at one time. Without held-out rows there are only kl
    and alpha, on training rows.

    Attributes:
        kl: mean KL of the mixture at strength 1 from the backbone, in nats per token.
        alpha: mean alpha at strength 1.
        correct, total: pairs that the reward head ranks right, and all pairs.
        tied: whether all rewards are equal, since the head has not learnt anything yet.
        below, above: shares of the tokens with alpha below 0.01 and above 0.99.
    """

    kl: float
    alpha: float
    correct: int = 0
    total: int = 0
    tied: bool = False
    below: float = 0.0
    above: float = 0.0

    @property
    def accuracy(self) -> float:
        """The share of pairs ranked right; a tie counts as half."""
        return 0.5 if self.tied else self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson) of ``correct / total``."""
        return wilson_interval(self.correct, self.total)


def measure(trainer: DualHeadTrainer) -> Figures:
    """The figures of the trainer's current heads."""
    kl, alpha = trainer.probe(_STATES)()
    rows: Any = trainer.eval_dataset  # tokenised rows
    if not rows:
        return Figures(kl, alpha)
    ranked = "scores" in rows[0]
    total = sum(len(score_pairs(row["scores"])) for row in rows) if ranked else len(rows)
    found = trainer.evaluate()
    shares = (found[f"eval_gate/{name}"] for name in ("below_0.01", "above_0.99"))
    correct = round(found["eval_rewards/accuracies"] * total)
    tied = found["eval_rewards/chosen"] == found["eval_rewards/rejected"] == 0
    return Figures(kl, found["eval_gate/mean"], correct, total, tied, *shares)


def print_figures(before: Figures, after: Figures, held_out: Sequence[dict[str, Any]]) -> None:
    """Print accuracy with intervals, KL and mean alpha, before and after training."""
    where = "of held-out responses" if held_out else "of training responses"
    if held_out:
        print("\npreference accuracy of the reward head on held-out pairs")
        for name, found in (("before", before), ("after", after)):
            line = f"{found.total} ties: an untrained head prefers nothing"
            if not found.tied:
                line = accuracy_line(found.correct, found.total, found.interval)
            print(f"  {name:23} {line}")
        print(f"  always the longer one   {percent(longer_is_better(held_out)[0])}")
    print(f"\nmixture at strength 1, on tokens {where}")
    print(f"  mean alpha              {before.alpha:.3f} before, {after.alpha:.3f} after")
    print(f"  KL from the backbone    {before.kl:.3g} before, {after.kl:.3g} after, nats per token")


def sample_before_and_after(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], seed: int
) -> list[tuple[str, Reply, Reply]]:
    """(question, the backbone's reply, the reply at strength 1) for the first prompts of the rows
    that leave room in the context. Both replies use the same random numbers.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    prompts: dict[str, Any] = {}
    for row in rows:
        key = json.dumps(row["prompt"])
        if len(prompts) == REPLIES:
            break
        if not row["prompt"] or key in prompts:
            continue
        ids, _ = encode_prompts([prompt_text(row["prompt"], tokenizer)], tokenizer)
        if context is None or ids.shape[1] + NEW_TOKENS <= context:
            prompts[key] = row["prompt"]
    if not prompts:
        return []
    asked = list(prompts.values())
    found = sample_replies(model, tokenizer, asked, (0.0, 1.0), NEW_TOKENS, seed)
    questions = [p if isinstance(p, str) else p[-1]["content"] for p in asked]
    return [
        (question, plain, gated) for question, (plain, gated) in zip(questions, found, strict=True)
    ]


def print_replies(replies: Sequence[tuple[str, Reply, Reply]]) -> None:
    """Print each question on a line, and both replies below it."""
    if replies:
        print(f"\nreplies, sampled, at most {NEW_TOKENS} tokens: before (the backbone), and after")
    for question, before, after in replies:
        print(f"\n  {_line(question, last=True)}")
        print(f"    before: {_line(before.text)}")
        print(f"    after:  {_line(after.text)}")


def _line(text: str, last: bool = False, width: int = 240) -> str:
    """A text on one line; the beginning of a long text, or its end if ``last``."""
    line = printable(" ".join(text.split()))
    if len(line) <= width:
        return line
    return f"... {line[-width:]}" if last else f"{line[:width]} ..."


def warnings_of(
    after: Figures, replies: Sequence[tuple[str, Reply, Reply]], config: Any, gate_rate: float
) -> list[str]:
    """Warnings about trained heads, with options that may help.

    Args:
        config: the heads' DualHeadConfig. gate_rate: the gate's learning rate.
    """
    found = []
    if config.gate != "fixed" and after.below + after.above > COLLAPSED_SHARE:
        side = "0: the text is the backbone's" if after.below > after.above else "1"
        found.append(
            f"alpha has collapsed to {side} ({percent(after.below)} of the tokens below 0.01, "
            f"{percent(after.above)} above 0.99); try --gate-learning-rate {gate_rate / 10:g}, "
            "--reward-l2 0, --gate-regularizer entropy --lambda-g 0.01, or --gate fixed"
        )
    same = bool(replies) and all(before.text == after.text for _, before, after in replies)
    if same or after.kl < _NOTHING:
        what = "the replies are the backbone's" if same else "the text is almost the backbone's"
        remedy = "train on with more --epochs or a larger --learning-rate"
        if config.kl_curve is None:
            remedy = "calibrate with --set calibrate=true, or " + remedy
        found.append(
            f"{what}: the mixture is {after.kl:.2g} nats per token from it; {remedy}, or decode "
            "with --strength 3"
        )
    return found
