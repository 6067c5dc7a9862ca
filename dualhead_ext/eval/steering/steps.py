# SPDX-License-Identifier: Apache-2.0
"""How each kind of cell is computed: samples, trained systems, decoded texts, timings."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ...model.builtin_backbones import backbone_path
from ..paper.cells import Cell, Step, Store
from ..paper.training_run import load_tokenizer
from ..rollout import Backbone, Policy, Prefix, Rollout, read_prompts, response_logprobs, roll_out
from ..sampling import batches, prompt_text, response, sample
from ..text import mean_length
from . import json_lines
from .attributes import ATTRIBUTES, measured, prompts_of
from .intervals import mean_interval
from .policies import GatedPolicy, GuidedPolicy, SearchPolicy, TunedPolicy
from .timing import tokens_per_second
from .training import load_guide, load_head, ranked_rows, train_gated_head, train_other

TEXTS = "texts.jsonl"
# Relative tolerances of the KL: of the first batch, and of all batches together.
_NEAR, _WITHIN = 0.04, 0.1
_TRIES = 8
_TRAININGS = 3


class Resources:
    """What the cells of a run share: a backbone, and its cache of the prompts."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple[Any, ...], list[Prefix]] = {}
        self._name: str | None = None

    def use(self, name: str) -> Resources:
        """Load a backbone, unless it is already loaded."""
        if name != self._name:
            self.path = backbone_path(name)
            self.tokenizer = load_tokenizer(Path(self.path))
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = model.eval().requires_grad_(False).to(device)
            self._name, self._prefixes = name, {}
        return self

    @cached_property
    def ends(self) -> list[int]:
        """The end tokens."""
        found = self.model.generation_config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def texts(self, questions: Sequence[str]) -> list[str]:
        """The questions as prompts that the model reads."""
        return [
            prompt_text([{"role": "user", "content": question}], self.tokenizer)
            for question in questions
        ]

    def prefixes(self, kind: str, count: int, batch_size: int) -> list[Prefix]:
        """The evaluation prompts, in batches."""
        key = (kind, count, batch_size)
        if key not in self._prefixes:
            texts = self.texts(prompts_of(kind, "measure", count))
            parts = batches(texts, batch_size)
            self._prefixes = {
                key: [read_prompts(self.model, self.tokenizer, part) for part in parts]
            }
        return self._prefixes[key]


# --- samples --------------------------------------------------------------------------------------


def samples(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: backbone, prompts, split, count, numbers [first, end), seed, new_tokens. Resumes
    from the samples of an interrupted run.
    """
    o, path = cell.options, samples_file(store, cell.key)
    use = store.data.use(o["backbone"])
    questions = prompts_of(o["prompts"], o["split"], o["count"])
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json_lines.read(path) if path.is_file() else []
    numbers = range(*o["numbers"])
    size = max(1, 96 // len(numbers))
    with open(path, "ab") as file:
        file.truncate(sum(len(json_lines.line(row)) for row in done))
        for part in batches(questions[len(done) :], size):
            found = sample(
                use.model, use.tokenizer, use.texts(part), numbers, o["new_tokens"], seed=o["seed"]
            )
            for question, responses in zip(part, found, strict=True):
                row = {
                    "prompt": question,
                    "responses": [r.text for r in responses],
                    "ended": [r.ended for r in responses],
                }
                file.write(json_lines.line(row))
            file.flush()
            os.fsync(file.fileno())
    return {"rows": len(questions), "responses": len(questions) * len(numbers)}


def samples_file(store: Store, key: str) -> Path:
    """The path of a cell's samples: next to the cells, since a retry empties the cell's folder."""
    return store.out / "samples" / f"{key}.jsonl"


# --- training -------------------------------------------------------------------------------------


def train(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: backbone, method, attributes, options, training, max_length, seed; needs samples
    and, of a gated head, held_out.
    """
    o, path = cell.options, store.data.use(cell.options["backbone"]).path
    rows = {
        role: ranked_rows(json_lines.read(samples_file(store, need.key)), o["attributes"])
        for role, need in cell.needs.items()
    }
    if o["method"] != "dual_head":
        return train_other(o["method"], path, rows["samples"], folder, dict(o))
    # Attributes that rank the same texts share the cached hidden states.
    texts = [[row["prompt"], row["responses"]] for part in rows.values() for row in part]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    hidden = store.out / "hidden" / digest
    result = train_gated_head(path, rows["samples"], rows["held_out"], folder, dict(o), hidden)
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return result | {"samples": sum(len(row["responses"]) for row in rows["samples"])}


# --- decoding -------------------------------------------------------------------------------------


def decode(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: see `plan.Planner`. Returns figures and writes the texts. If no strength reaches the
    target, the result lists the strengths that were tried, without texts.
    """
    o = cell.options
    store.data.use(o["backbone"])
    attribute = ATTRIBUTES[o["attribute"]]
    questions = prompts_of(attribute.prompts, "measure", o["prompts"])
    folder.mkdir(parents=True)
    try:
        if o["best_of"]:
            texts, figures = _best(cell, store, questions)
        else:
            texts, figures = _steered(cell, store)
    except OutOfReach as error:
        return {"out_of_reach": error.tried}
    written = [{"prompt": q, "text": text} for q, text in zip(questions, texts, strict=True)]
    json_lines.write(written, folder / TEXTS)
    names = dict.fromkeys(attribute.scorers)
    if o["weights"] is not None:  # two objectives: both are scored
        names |= dict.fromkeys(n for a in ATTRIBUTES.values() for n in a.scorers)
    scores = {name: mean_interval(measured(name, questions, texts)) for name in names}
    return figures | {"scores": scores, "words": mean_length(texts)}


def _best(cell: Cell, store: Store, questions: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The sample with the best gold score among n."""
    o, use = cell.options, store.data
    parts = [json_lines.read(samples_file(store, need.key)) for need in cell.needs.values()]
    gold, texts, ended = ATTRIBUTES[o["attribute"]], [], []
    for question, *rows in zip(questions, *parts, strict=True):
        candidates = [text for row in rows for text in row["responses"]]
        ends = [end for row in rows for end in row["ended"]]
        scores = measured(gold.gold, [question] * len(candidates), candidates)
        sign = 1 if gold.higher_is_better else -1
        best = max(range(len(candidates)), key=lambda i: sign * scores[i])
        texts.append(candidates[best])
        ended.append(ends[best])
    logprobs, tokens = 0.0, 0
    size = o["batch_size"]
    prefixes = use.prefixes(gold.prompts, o["prompts"], size)
    for prefix, part, ends in zip(
        prefixes, batches(texts, size), batches(ended, size), strict=True
    ):
        found = response_logprobs(use.model, use.tokenizer, prefix, part, ends)
        logprobs, tokens = logprobs + found[0], tokens + found[1]
    n = o["best_of"]
    # KL of choosing among n samples, per text: at most log n - (n - 1) / n.
    bound = (math.log(n) - (n - 1) / n) * len(questions) / tokens
    figures = {"kl": bound, "perplexity": math.exp(-logprobs / tokens)}
    return texts, figures | {"strength": None, "alpha": None, "tokens": tokens}


def _steered(cell: Cell, store: Store) -> tuple[list[str], dict[str, Any]]:
    o, use = cell.options, store.data
    prefixes = use.prefixes(ATTRIBUTES[o["attribute"]].prompts, o["prompts"], o["batch_size"])
    make, first = _policies(cell, store)

    def run(prefix: Prefix, strength: float) -> Rollout:
        policy = make(strength)
        return roll_out(use.model, prefix, policy, o["new_tokens"], o["seed"], use.ends)

    if o["kl_target"] is None:
        strength = o["strength"] if o["strength"] is not None else 0.0
        rolled = [run(prefix, strength) for prefix in prefixes]
    else:
        strength, rolled = at_kl(run, prefixes, o["kl_target"], first)
    texts = [
        response(tokens[: int(written.sum())].tolist(), use.tokenizer, use.ends).text
        for part in rolled
        for tokens, written in zip(part.tokens, part.written, strict=True)
    ]
    logprob, tokens = _pooled(rolled, "logprob")
    alpha = None if rolled[0].alpha is None else _pooled(rolled, "alpha")[0]
    return texts, {
        "kl": _pooled(rolled, "kl")[0],
        "perplexity": math.exp(-logprob),
        "strength": strength,
        "alpha": alpha,
        "tokens": tokens,
    }


def _pooled(rolled: Sequence[Rollout], name: str) -> tuple[float, int]:
    """The mean over all tokens, and the number of tokens."""
    counts = [int(part.written.sum()) for part in rolled]
    total = sum(part.mean(name) * n for part, n in zip(rolled, counts, strict=True))
    return total / sum(counts), sum(counts)


class OutOfReach(Exception):
    """No strength reaches the target KL. ``tried``: (strength, KL) of every attempt."""

    def __init__(self, target: float, tried: list[tuple[float, float]]) -> None:
        super().__init__(f"no strength gives a KL of {target:g}; tried {tried}")
        self.tried = tried


def at_kl(
    run: Any, prefixes: Sequence[Prefix], target: float, strength: float
) -> tuple[float, list[Rollout]]:
    """Decode at the strength whose texts are ``target`` nats per token from the backbone. The
    strength is found by the secant method for log KL over log strength, on the first batch.

    Raises:
        OutOfReach: no strength reaches the target.
    """
    tried: list[tuple[float, float]] = []
    for _ in range(_TRIES):
        first = run(prefixes[0], strength)
        kl = first.mean("kl")
        if abs(kl / target - 1) <= _NEAR or _settled(tried, strength):
            rolled = [first, *(run(prefix, strength) for prefix in prefixes[1:])]
            whole = _pooled(rolled, "kl")[0]
            if abs(whole / target - 1) <= _WITHIN:
                return strength, rolled
            kl *= whole / kl  # all batches are more precise than the first
        tried.append((strength, kl))
        strength = _next_strength(tried, target)
    raise OutOfReach(target, tried)


def _settled(tried: Sequence[tuple[float, float]], strength: float) -> bool:
    return any(abs(strength / s - 1) < 0.01 for s, _ in tried)


def _next_strength(tried: Sequence[tuple[float, float]], target: float) -> float:
    """The next strength to try. The first guess assumes that KL grows with the strength squared;
    from two points on, the slope is measured."""
    (s, kl), power = tried[-1], 2.0
    if len(tried) > 1:
        s0, kl0 = tried[-2]
        if abs(math.log(s / s0)) > 1e-3:
            power = math.log(max(kl, 1e-9) / max(kl0, 1e-9)) / math.log(s / s0)
            power = min(max(power, 0.7), 3.0)
    factor = (target / max(kl, 1e-9)) ** (1.0 / power)
    return s * min(max(factor, 0.1), 10.0)


def _policies(cell: Cell, store: Store) -> tuple[Any, float]:
    """(strength -> policy, a first strength to try)."""
    o, use = cell.options, store.data
    if o["method"] is None:
        return lambda strength: Backbone(), 1.0
    folder = store.folder(cell.needs["model"])
    if o["method"] == "dual_head":
        head, curve = load_head(folder, use.model.get_output_embeddings())
        first = _on_curve(curve, o["kl_target"]) if curve and o["kl_target"] else 1.0
        return lambda strength: GatedPolicy(head, strength, o["weights"]), first
    guide = load_guide(o["method"], folder, use.path).to(use.model.device)
    kinds: dict[str, type[Policy]] = {
        "autoregressive_reward": GuidedPolicy,
        "dpo": TunedPolicy,
        "reward_model": SearchPolicy,
    }
    return lambda strength: kinds[o["method"]](guide, strength), 1.0


def _on_curve(curve: Sequence[Sequence[float]], kl: float) -> float:
    """The strength for a KL, interpolated on a measured curve, or extrapolated as sqrt(KL)."""
    from itertools import pairwise

    for (s0, k0), (s1, k1) in pairwise(curve):
        if k0 <= kl <= k1 and k1 > k0:
            return s0 + (s1 - s0) * (kl - k0) / (k1 - k0)
    s, k = curve[-1]
    return s * math.sqrt(kl / k)


# --- time -----------------------------------------------------------------------------------------


def cost(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: backbone, method, new_tokens; needs model unless the system is the backbone. Returns
    tokens per second of the system and of the plain backbone, timed in turns.
    """
    o, use = cell.options, store.data.use(cell.options["backbone"])
    model = None if not cell.needs else store.folder(cell.needs["model"])
    rates = tokens_per_second(use, o["method"], model, o["new_tokens"])
    ratios = [plain / system for plain, system in rates]
    return {
        "tokens_per_second": median(system for _, system in rates),
        "plain_tokens_per_second": median(plain for plain, _ in rates),
        "times_plain": median(ratios),
    }


def training_time(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options and needs: as for :func:`train`. Trains several times; the training of the cell that
    is decoded may have shared the machine with others.
    """
    runs = []
    for _ in range(_TRAININGS):
        shutil.rmtree(folder, ignore_errors=True)
        found = train(cell, store, folder)
        runs.append(found["train_seconds"])
    return {
        "train_seconds": median(runs),
        "runs": runs,
        "samples": found["samples"],
        "threads": torch.get_num_threads(),
    }


STEPS: dict[str, Step] = {
    "samples": Step(samples),
    "train": Step(train, writes=True, reads=False),
    "decode": Step(decode, writes=True),
    "cost": Step(cost),
    "training_time": Step(training_time, writes=True, reads=False),
}
