# SPDX-License-Identifier: Apache-2.0
"""Human preference pairs (HH-RLHF) on a real backbone: which rewards tell held-out pairs apart?

    python benchmarks/hh_pairs.py states STATES --data DATA
    python benchmarks/hh_pairs.py fit STATES FILE --data DATA
    python benchmarks/hh_pairs.py table FILE
    python benchmarks/hh_pairs.py decode STATES TEXTS --data DATA

DATA holds train.jsonl.gz and test.jsonl.gz. The first command runs the backbone once over all pairs
and keeps in the folder STATES what the rewards read: the hidden states of the responses and their
tokens' log-probabilities. The second trains each reward of `REWARDS` on them with each seed, and
adds a row for it to FILE; it keeps the rows that are there. The third prints the rows as a Markdown
table. The fourth trains a head on each subset alone and decodes test prompts of this subset with
it. With --minutes, the first two stop in between and continue the next time.

A seed chooses the tenth of the training pairs that early stopping or the penalty is chosen on, and
the order of training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from hh_states import (
    SIDES,
    SUBSETS,
    Pair,
    keep_states,
    log_probs_of,
    read_pairs,
    read_states,
    states_of,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data.collate import PreferenceCollator
from dualhead_ext.eval.likelihood import perplexity, token_mean
from dualhead_ext.eval.metrics import wilson_interval
from dualhead_ext.eval.text import diversity, mean_length
from dualhead_ext.files.atomic import write_durably
from dualhead_ext.head.calibration import mean_kl
from dualhead_ext.measurement.machine import describe
from dualhead_ext.model.builtin_backbones import backbone_path
from dualhead_ext.train.hidden_cache import HiddenCollator

# --- rewards --------------------------------------------------------------------------------------
# Each gives the scores (P, 2) of the responses of the test pairs.


@dataclass
class Job:
    """What a reward is trained on and measured on.

    Attributes:
        model: the gated backbone, whose heads are replaced for each reward.
        held_out: a tenth of the training pairs; train is without it.
    """

    model: Any
    train: list[Pair]
    held_out: list[Pair]
    test: list[Pair]
    seed: int

    def quarter(self) -> Job:
        """The same with a quarter of the pairs for training."""
        return replace(self, train=self.train[::4])

    def alone(self, subset: str) -> Job:
        """The same with one subset for training."""
        parts = (
            [pair for pair in pairs if pair.subset == subset]
            for pairs in (self.train, self.held_out)
        )
        return replace(self, **dict(zip(("train", "held_out"), parts, strict=True)))


def longer(job: Job, shorter: Sequence[str] = ()) -> Tensor:
    """The length in characters, with the other sign in the subsets ``shorter``."""
    signs = [-1 if pair.subset in shorter else 1 for pair in job.test]
    rows = [[sign * n for n in pair.characters] for sign, pair in zip(signs, job.test, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def log_probability(job: Job, mean: bool) -> Tensor:
    """The log-probability under the backbone, summed or per token."""

    def score(log_probs: Tensor, spoken: list[int]) -> float:
        picked = log_probs[torch.tensor(spoken).bool()]
        return float(picked.mean() if mean else picked.sum())

    return torch.tensor([[*map(score, pair.log_probs, pair.spoken)] for pair in job.test])


# Linear rewards: logistic regression on features of the two responses.


def mean_state(pair: Pair) -> Tensor:
    """The mean state after each token, (2, d)."""
    return torch.stack([after.mean(0) for _, _, after in pair.texts()])


def summed_state(pair: Pair) -> Tensor:
    """The sum of these states, (2, d)."""
    return torch.stack([after.sum(0) for _, _, after in pair.texts()])


def last_state(pair: Pair) -> Tensor:
    """The state after the end token, (2, d)."""
    return torch.stack([after[-1] for _, _, after in pair.texts()])


Features = Callable[[Pair], Tensor]
PENALTIES = [10.0**power for power in range(-3, 2)]


def discriminant(job: Job, features: Features, weights: Tensor | None = None) -> Tensor:
    """u (n,) of a linear reward: logistic regression of the pairs on the difference of their
    features, with the penalty that is best on the held-out pairs. weights: of the pairs.
    """
    parts = (job.train, job.held_out)
    stacked = [torch.stack([*map(features, pairs)]).double() for pairs in parts]
    x, held_out = (values[:, 0] - values[:, 1] for values in stacked)
    scale = x.square().mean(0).sqrt().clamp(min=1e-12).reciprocal()
    weights = torch.ones(len(x)) if weights is None else weights
    weights = (weights / weights.mean()).double()
    found = []
    for penalty in PENALTIES:
        u = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([u], max_iter=100, line_search_fn="strong_wolfe")

        def loss(u: Tensor = u, penalty: float = penalty, solver: Any = solver) -> Tensor:
            solver.zero_grad()
            value = -(weights * F.logsigmoid(x * scale @ u)).mean() + penalty / 2 * u.square().sum()
            value.backward()
            return value

        solver.step(loss)
        with torch.no_grad():
            found.append((float(-F.logsigmoid(held_out * scale @ u).mean()), u.detach() * scale))
    return min(found, key=lambda pair: pair[0])[1]


def linear(job: Job, features: Features, weighted: bool = False) -> Tensor:
    """A linear reward of features. weighted: each pair counts by how sure the same reward is of it,
    |2 p - 1|, where it was fitted on the other half of the pairs.
    """
    weights = torch.ones(len(job.train))
    if weighted:
        for half in (0, 1):
            u = discriminant(replace(job, train=job.train[1 - half :: 2]), features)
            scores = torch.stack([*map(features, job.train[half::2])]).double() @ u
            weights[half::2] = torch.tanh((scores[:, 0] - scores[:, 1]).abs() / 2).float()
    u = discriminant(job, features, weights)
    return torch.stack([*map(features, job.test)]).double() @ u


def by_subset(job: Job, reward: Callable[[Job], Tensor]) -> Tensor:
    """A reward for each subset, trained on it alone."""
    found = {name: reward(job.alone(name)) for name in SUBSETS}
    return torch.stack([found[pair.subset][i] for i, pair in enumerate(job.test)])


# Token rewards: the package's heads and trainer.


def new_head(job: Job, **head: Any) -> Any:
    """The model with a new reward head and the fixed gate."""
    torch.manual_seed(job.seed)
    return dh.DualHeadForCausalLM.from_backbone(dh.detach(job.model), trial=False, **head)


@torch.no_grad()
def token_scores(job: Job, mean: bool = False, objectives: bool = False) -> Tensor:
    """The sums of the token rewards of the test pairs' responses, or their means."""
    head = job.model.lm_head_module
    rows = []
    for pair in job.test:
        k = SUBSETS.index(pair.subset) if objectives else 0
        of_tokens = [
            head.reward_head.token_rewards(before, ids, head.lm_weight)[k]
            for ids, before, _ in pair.texts()
        ]
        rows.append([float(x.mean() if mean else x.sum()) for x in of_tokens])
    return torch.tensor(rows)


@dataclass
class Rows:
    """The trainer's rows of pairs, and a collator that adds their hidden states. Of a prompt they
    have the last token only: the fixed gate reads no other.
    """

    pairs: Sequence[Pair]

    def coded(self, objectives: bool) -> list[dict[str, Any]]:
        """The rows. objectives: each subset has its own."""
        rows = []
        for number, pair in enumerate(self.pairs):
            row = {"number": number, "objective": SUBSETS.index(pair.subset) if objectives else 0}
            for side, ids, mask in zip(SIDES, pair.responses, pair.spoken, strict=True):
                row[f"{side}_input_ids"] = [pair.prompt[-1], *ids]
                row[f"{side}_completion_mask"] = [0, *mask]
            rows.append(row)
        return rows

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        states = [{"hidden_states": (self.pairs[r["number"]].states, torch.float32)} for r in rows]
        collator = HiddenCollator(PreferenceCollator(pad_token_id=0))
        return collator([row | own for row, own in zip(rows, states, strict=True)])


def trained(job: Job, head: dict[str, Any], **training: Any) -> Tensor:
    """Train a reward head with the default preset and early stopping; ``head`` and ``training``
    override it.
    """
    model, objectives = new_head(job, **head), head.get("num_objectives", 1) > 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = dh.DualHeadTrainingArguments(
            output_dir=folder,
            seed=job.seed,
            early_stopping_patience=1,
            calibrate=False,
            cache_hidden="none",  # the rows have their hidden states
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **training,
        )
        rows = Rows([*job.train, *job.held_out])
        coded, count = rows.coded(objectives), len(job.train)
        trainer = dh.DualHeadTrainer(model, arguments, rows, coded[:count], coded[count:])
        trainer.train()
    mean = training.get("pref_reduction") == "mean"
    return token_scores(job, mean, objectives)


def folded(job: Job, rank: int, epochs: int = 6) -> Tensor:
    """A value of the state, folded into token rewards.

    Decoding cannot use V(h_t) = u h_t itself: it is the same for all next tokens, and cancels in
    the softmax. The token y_t decides V(h_{t+1}). So delta_t(y_t) is fitted to it by least squares,
    beside a linear function of h_t, which takes up what the prompt and the tokens before decide and
    is then dropped.
    """
    u = discriminant(job, mean_state)
    model = new_head(job, reward_head="embedding", reward_rank=rank)
    reward_head, weight = model.lm_head_module.reward_head, model.lm_head_module.lm_weight.detach()
    texts = [text for pair in job.train for text in pair.texts()]
    ids, before, after = (torch.cat(column) for column in zip(*texts, strict=True))
    target = (after - before) @ u.float()
    target = target / target.std()
    rest = nn.Linear(before.shape[1], 1)
    nn.init.zeros_(rest.weight)
    parameters = [*reward_head.requires_grad_().parameters(), *rest.parameters()]
    size = 1024
    solver = torch.optim.Adam(parameters, 3e-3)
    steps = epochs * -(-len(ids) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(ids)).split(size):
            solver.zero_grad()
            delta = reward_head.token_rewards(before[part], ids[part], weight)[0]
            loss = (delta + rest(before[part])[:, 0] - target[part]).square().mean()
            loss.backward()
            solver.step()
            schedule.step()
    return token_scores(job)


RULES: dict[str, Callable[[Job], Tensor]] = {
    "mean log-probability": lambda job: log_probability(job, mean=True),
    "summed log-probability": lambda job: log_probability(job, mean=False),
    "the longer one": longer,
    "the longer helpful, the shorter harmless one": lambda job: longer(job, [SUBSETS[1]]),
}
MEAN, NO_L2 = {"pref_reduction": "mean"}, {"reward_l2": 0.0}
TWO = {"num_objectives": 2}
REWARDS: dict[str, Callable[[Job], Tensor]] = RULES | {
    "token rewards (default)": lambda job: trained(job, {}),
    "token rewards, rank 4": lambda job: trained(job, {"reward_rank": 4}),
    "token rewards, rank 16": lambda job: trained(job, {"reward_rank": 16}),
    "token rewards, rank 64": lambda job: trained(job, {"reward_rank": 64}),
    "token rewards, lowrank 16": lambda job: trained(job, {"reward_head": "lowrank"}),
    "token rewards, mean": lambda job: trained(job, {}, **MEAN),
    "token rewards, no penalty": lambda job: trained(job, {}, **NO_L2),
    "value of the state, mean": lambda job: linear(job, mean_state),
    "value of the state, mean, pairs weighted": lambda job: linear(job, mean_state, weighted=True),
    "value of the state, summed": lambda job: linear(job, summed_state),
    "value of the state, last": lambda job: linear(job, last_state),
    "value folded into token rewards, rank 64": lambda job: folded(job, 64),
    "two heads": lambda job: trained(job, TWO),
    "two heads, a quarter of the pairs": lambda job: trained(job.quarter(), TWO),
    "two heads, rank 16": lambda job: trained(job, TWO | {"reward_rank": 16}),
    "two heads, mean": lambda job: trained(job, TWO, **MEAN),
    "two values, mean": lambda job: by_subset(job, lambda job: linear(job, mean_state)),
    "two values, summed": lambda job: by_subset(job, lambda job: linear(job, summed_state)),
    "two values folded, rank 64": lambda job: by_subset(job, lambda job: folded(job, 64)),
}


# --- rows and table -------------------------------------------------------------------------------


def wins_of(scores: Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
    """The pairs that scores (P, 2) rank right: of all, and of each subset. A tie counts half."""
    right = ((scores[:, 0] - scores[:, 1]).sign().double() + 1) / 2
    found = {"all": float(right.sum())}
    for name in SUBSETS:
        found[name] = float(right[[pair.subset == name for pair in pairs]].sum())
    return found


def job_of(model: Any, splits: dict[str, list[Pair]], seed: int) -> Job:
    """The job of a seed."""
    pairs = splits["train"]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, train = order[: len(order) // 10], order[len(order) // 10 :]
    return Job(model, [pairs[i] for i in train], [pairs[i] for i in held_out], splits["test"], seed)


def described(options: argparse.Namespace, splits: dict[str, list[Pair]]) -> dict[str, Any]:
    """The machine, the software, the settings, and the numbers of pairs."""
    test = splits["test"]
    counts = {"all": len(test)}
    counts |= {name: sum(pair.subset == name for pair in test) for name in SUBSETS}
    new = describe("cpu") | {"packages": {"transformers": transformers.__version__}}
    new |= {"backbone": options.backbone, "states": "bfloat16", "max_length": options.max_length}
    new |= {"longest": options.longest, "training_pairs": len(splits["train"])}
    return new | {"test_pairs": counts}


def fit(
    options: argparse.Namespace, model: Any, splits: dict[str, list[Pair]], until: float
) -> None:
    """Add the rows that are missing in the results file.

    Raises:
        SystemExit: the file is of another commit, version or setting, or the time is over.
    """
    new = described(options, splits) | {"rows": []}
    results = json.loads(options.file.read_text()) if options.file.is_file() else new
    settings = ("backbone", "max_length", "longest", "training_pairs", "test_pairs")
    for name in ("device", "commit", "torch", "packages", *settings):
        if results[name] != new[name]:
            raise SystemExit(f"{options.file}: its {name} is {results[name]}, this is {new[name]}")
    done = {(row["reward"], row["seed"]) for row in results["rows"]}
    for seed in range(options.seeds):
        for name, reward in REWARDS.items():
            seeded = None if name in RULES else seed
            if (name, seeded) in done or (seed and name in RULES):
                continue
            if time.monotonic() > until:
                raise SystemExit(f"{name}, seed {seed}, and later ones are missing: run this again")
            begin, job = time.process_time(), job_of(model, splits, seed)
            scores = reward(job)
            row = {"reward": name, "seed": seeded, "right": wins_of(scores, job.test)}
            row["cpu_seconds"] = round(time.process_time() - begin, 1)
            results["rows"].append(row)
            print(row, flush=True)
            write_durably(options.file, json.dumps(results, indent=1).encode() + b"\n")


# --- decoded text ---------------------------------------------------------------------------------

NEW_TOKENS, KL, STATES = 48, 0.1, 256


def strength_at(head: Any, hidden: Tensor) -> float:
    """The strength at which the KL from the backbone is `KL` nats at hidden states (N, d). The KL
    grows nearly as the square of the strength.
    """
    hidden, strength = hidden[:: max(1, len(hidden) // STATES)], 1.0
    for _ in range(5):
        kl = mean_kl(head, hidden, torch.zeros(len(hidden)), strength)  # alpha = 1/2
        strength *= float(KL / kl.mean()) ** 0.5
    return strength


@torch.no_grad()
def decode(job: Job, subset: str, tokenizer: Any, prompts: int) -> dict[str, Any]:
    """Continue test prompts of a subset with the backbone and with the default head, trained on the
    subset alone, with the same random numbers. The strength is that of `KL` nats per token on
    held-out responses; the KL of the decoded text is measured.
    """
    job = job.alone(subset)
    with torch.enable_grad():
        trained(job, {})
    model, head = job.model, job.model.lm_head_module
    hidden = torch.cat([before for pair in job.held_out for _, before, _ in pair.texts()])
    strengths = {"backbone": 0.0, "steered": strength_at(head, hidden)}
    pairs = [pair for pair in job.test if pair.subset == subset]
    pairs = pairs[:: max(1, len(pairs) // prompts)][:prompts]
    width = max(len(pair.prompt) for pair in pairs)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p.prompt)) + p.prompt for p in pairs])
    mask = torch.tensor([[0] * (width - len(p.prompt)) + [1] * len(p.prompt) for p in pairs])
    answers: dict[str, list[list[int]]] = {}
    for name, strength in strengths.items():
        out = model.generate(
            input_ids=ids, attention_mask=mask, strength=strength, do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, seeds=torch.arange(len(pairs)),
        )  # fmt: skip
        rows = out[:, width:].tolist()
        answers[name] = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    kl: dict[str, list[Tensor]] = {name: [] for name in answers}
    log_probs: dict[str, list[Tensor]] = {name: [] for name in answers}
    for i, pair in enumerate(pairs):
        written = replace(pair, responses=[answers[name][i] for name in answers])
        states = states_of(model.get_decoder(), [written])[0]
        for name, tokens, h in zip(answers, written.responses, states, strict=True):
            zeros = torch.zeros(len(tokens))
            kl[name].append(mean_kl(head, h[:-1], zeros, strengths[name]))
            log_probs[name].append(log_probs_of(head.lm_weight.float(), tokens, h))
    found: dict[str, Any] = {"subset": subset, "seed": job.seed, "strengths": strengths}
    texts = {
        name: [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        for name, rows in answers.items()
    }
    for name, rows in answers.items():
        found[name] = {
            "kl": token_mean(kl[name])._asdict(),
            "perplexity": perplexity(log_probs[name])._asdict(),
            "words": mean_length(texts[name]),
            "diversity": diversity(texts[name], plus_one=False),
            "ended": fmean(row[-1] == eos for row in rows),
        }
    found["texts"] = [
        {"prompt": tokenizer.decode(pair.prompt), **{name: texts[name][i] for name in texts}}
        for i, pair in enumerate(pairs)
    ]
    return found


def table(results: dict[str, Any]) -> str:
    """The share of test pairs ranked right, in per cent with its 95 % interval (Wilson, over
    pairs), means over seeds, and for all pairs the seeds.
    """
    names = list(results["test_pairs"])
    lines = [f"| reward | {' | '.join(names)} | seeds |", "|" + " --- |" * (len(names) + 2)]
    for reward in dict.fromkeys(row["reward"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["reward"] == reward]
        cells = []
        for name in names:
            count, right = results["test_pairs"][name], fmean(row["right"][name] for row in rows)
            low, high = wilson_interval(right, count)
            cells.append(f"{100 * right / count:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        seeds = [100 * row["right"]["all"] / results["test_pairs"]["all"] for row in rows]
        shown = ", ".join(f"{share:.1f}" for share in seeds) if len(rows) > 1 else "-"
        lines.append(f"| {reward} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("states", type=Path)
    shared.add_argument("--data", type=Path, required=True)
    shared.add_argument("--backbone", default="smollm2")
    shared.add_argument("--max-length", type=int, default=512, help="tokens per text")
    shared.add_argument("--pairs", type=int, help="of each split; default all")
    text = "leave out training pairs of which prompt and responses have more tokens; default none"
    shared.add_argument("--longest", type=int, help=text)
    shared.add_argument("--minutes", type=float, default=float("inf"))
    commands.add_parser("states", parents=[shared])
    fitting = commands.add_parser("fit", parents=[shared])
    fitting.add_argument("--seeds", type=int, default=3)
    decoding = commands.add_parser("decode", parents=[shared])
    decoding.add_argument("--prompts", type=int, default=32, help="of each subset")
    for command in (fitting, commands.add_parser("table"), decoding):
        command.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "table":
        print(table(json.loads(options.file.read_text())))
        return
    until = time.monotonic() + 60 * options.minutes
    options.path = backbone_path(options.backbone)
    tokenizer = AutoTokenizer.from_pretrained(options.path)
    splits = {}
    for split, longest in (("test", None), ("train", options.longest)):
        file, sizes = options.data / f"{split}.jsonl.gz", (options.max_length, options.pairs)
        splits[split] = read_pairs(file, tokenizer, *sizes, longest)
    if options.command == "states":
        model = AutoModelForCausalLM.from_pretrained(options.path, dtype=torch.bfloat16).eval()
        keep_states(model, splits, options.states, until)
        return
    read_states(splits, options.states)
    model = AutoModelForCausalLM.from_pretrained(options.path, dtype=torch.float32)
    model = dh.DualHeadForCausalLM.from_backbone(model, trial=False)
    if options.command == "fit":
        fit(options, model, splits, until)
        return
    found = described(options, splits) | {"decoded": []}
    job = job_of(model, splits, seed=0)
    for name in SUBSETS:
        found["decoded"].append(decode(job, name, tokenizer, options.prompts))
        write_durably(options.file, json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
