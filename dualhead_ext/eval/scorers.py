# SPDX-License-Identifier: Apache-2.0
"""Scorers measure a property of texts. One registry serves ``dualhead sample`` and ``dualhead
eval``.

A scorer has its own unit (school grades, words, a probability), and says whether more is better.
Samples are ranked by :meth:`Scorer.rewards`, of which higher is always better.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .judging import EndpointJudge, both_orders
from .text import words

# (text of a prompt, n responses) -> n numbers
Measure = Callable[[str, Sequence[str]], list[float]]
# The prefixes of scorers that take an argument.
REWARD_MODEL, JUDGE = "reward-model:", "judge:"


class ScorerError(ValueError):
    """A scorer failed, or did not return one finite number for each response."""


@dataclass(frozen=True)
class Scorer:
    """A scorer of texts.

    Attributes:
        name: as in the registry.
        measure: (prompt, n responses) -> n numbers in the scorer's unit.
        unit: the unit of the numbers.
        higher_is_better: whether more is better.
        compares: whether a number only compares a response with the other n - 1.
    """

    name: str
    measure: Measure
    unit: str = "score"
    higher_is_better: bool = True
    compares: bool = False

    def checked(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """``measure``, checked.

        Raises:
            ScorerError: not one finite number for each response, or a user's function failed.
        """
        found = [float(value) for value in self.measure(prompt, responses)]
        if len(found) != len(responses) or not all(map(math.isfinite, found)):
            raise ScorerError(
                f"scorer {self.name}: expected {len(responses)} finite numbers, one for each "
                f"response, got {found}"
            )
        return found

    def rewards(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """``checked``, negated if less is better."""
        found = self.checked(prompt, responses)
        return found if self.higher_is_better else [-value for value in found]


def _each(score: Callable[[str], float]) -> Measure:
    """A measure from a function of one text."""
    return lambda prompt, responses: [float(score(text)) for text in responses]


# --- packages, in the extra "steering" ------------------------------------------------------------


def _vader() -> Measure:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return _each(lambda text: analyzer.polarity_scores(text)["compound"])


def _afinn() -> Measure:
    from afinn import Afinn

    lexicon = Afinn()
    # Divided by the number of words, since a sum would reward length.
    return _each(lambda text: lexicon.score(text) / max(1, len(text.split())))


def _textblob() -> Measure:
    from textblob import TextBlob

    return _each(lambda text: TextBlob(text).sentiment.polarity)


def _textstat(function: str) -> Callable[[], Measure]:
    def load() -> Measure:
        import textstat

        return _each(getattr(textstat, function))

    return load


def _alt_profanity() -> Measure:
    from profanity_check import predict_prob

    return lambda prompt, responses: [float(p) for p in predict_prob(list(responses))]


def _better_profanity() -> Measure:
    from better_profanity import profanity

    return _each(profanity.contains_profanity)


@dataclass(frozen=True)
class _Entry:
    load: Callable[[], Measure]
    package: str | None
    unit: str
    higher_is_better: bool


_GRADES = "school grades"
# name -> (loader, package, unit, whether more is better)
SCORERS: dict[str, _Entry] = {
    # sentiment
    "vader": _Entry(_vader, "vaderSentiment", "compound score", True),
    "afinn": _Entry(_afinn, "afinn", "valence a word", True),
    "textblob": _Entry(_textblob, "textblob", "polarity", True),
    # readability: easier is better
    "ari": _Entry(_textstat("automated_readability_index"), "textstat", _GRADES, False),
    "coleman-liau": _Entry(_textstat("coleman_liau_index"), "textstat", _GRADES, False),
    "lix": _Entry(_textstat("lix"), "textstat", "LIX", False),
    # brevity
    "words": _Entry(lambda: _each(lambda text: len(words(text))), None, "words", False),
    "characters": _Entry(lambda: _each(len), None, "characters", False),
    # toxicity: a classifier trained on comments, and a list of words
    "alt-profanity-check": _Entry(_alt_profanity, "alt-profanity-check", "probability", False),
    "better-profanity": _Entry(_better_profanity, "better-profanity", "share of texts", False),
}


def scorer(name: str, judge_url: str | None = None) -> Scorer:
    """A scorer by its name.

    Args:
        name: a name in :data:`SCORERS`; or ``module:function``, a Python function (prompt,
            response) -> number, higher is better; or ``reward-model:FOLDER``, a transformers
            sequence classifier with one label; or ``judge:MODEL``, which asks an OpenAI-compatible
            endpoint to compare every two responses and scores each by the share that it wins.
        judge_url: the URL of the endpoint's API, such as ``http://localhost:8000/v1``.
    Raises:
        ValueError: an unknown name, a function or folder that does not exist, or a judge without a
            URL.
        ImportError: the scorer's package is not installed.
    """
    if name in SCORERS:
        entry = SCORERS[name]
        return Scorer(name, _loaded(name), entry.unit, entry.higher_is_better)
    if name.startswith(REWARD_MODEL):
        return Scorer(name, _reward_model(name.removeprefix(REWARD_MODEL)))
    if name.startswith(JUDGE):
        if judge_url is None:
            raise ValueError(f"scorer {name}: a judge needs the URL of its endpoint, got none")
        judge = EndpointJudge(judge_url, name.removeprefix(JUDGE))
        return Scorer(name, _by_wins(judge), "share of wins", compares=True)
    if ":" in name:
        return Scorer(name, _function(name))
    raise ValueError(
        f"scorer: expected one of {', '.join(SCORERS)}, or module:function, "
        f"{REWARD_MODEL}FOLDER or {JUDGE}MODEL, got {name!r}"
    )


@cache
def _loaded(name: str) -> Measure:
    entry = SCORERS[name]
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        raise ImportError(
            f"scorer {name}: it needs the package {entry.package}, which is not installed; "
            "install it with: pip install 'dualhead_ext[steering]'"
        ) from error


def _function(name: str) -> Measure:
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, as with python -m
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise ValueError(f"scorer {name}: there is no module {module}") from error
    except AttributeError as error:
        raise ValueError(f"scorer {name}: module {module} has no {attribute}") from error
    if not callable(function):
        raise ValueError(f"scorer {name}: {attribute} must be a function, got {function!r}")

    def measure(prompt: str, responses: Sequence[str]) -> list[float]:
        try:
            return [float(function(prompt, text)) for text in responses]
        except Exception as error:
            raise ScorerError(f"scorer {name}: {type(error).__name__}: {error}") from error

    return measure


def _reward_model(folder: str) -> Measure:
    """The classifier's one logit for the prompt and a response, as its chat template has them, or
    as two texts.
    """
    import os

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not os.path.isdir(folder):
        raise ValueError(f"scorer {REWARD_MODEL}{folder}: there is no folder {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    if model.config.num_labels != 1:
        raise ValueError(
            f"scorer {REWARD_MODEL}{folder}: expected a classifier with one label, got "
            f"{model.config.num_labels}"
        )

    @torch.inference_mode()
    def measure(prompt: str, responses: Sequence[str]) -> list[float]:
        scores = []
        for response in responses:  # one by one: a padding token may be the end token too
            scores.append(float(model(**_encoded(tokenizer, prompt, response)).logits[0, 0]))
        return scores

    return measure


def _encoded(tokenizer: Any, prompt: str, response: str) -> Any:
    if getattr(tokenizer, "chat_template", None):
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
        return tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    return tokenizer(prompt, response, return_tensors="pt", truncation=True)


def _by_wins(judge: EndpointJudge) -> Measure:
    def measure(prompt: str, responses: Sequence[str]) -> list[float]:
        count = len(responses)
        wins = [0.0] * count
        for i in range(count):
            for j in range(i + 1, count):
                verdict = both_orders(judge, prompt, responses[i], responses[j])
                wins[i] += verdict
                wins[j] += 1.0 - verdict
        return [won / max(1, count - 1) for won in wins]

    return measure
