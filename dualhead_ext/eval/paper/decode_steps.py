# SPDX-License-Identifier: Apache-2.0
"""Steps for generated texts: decoding, statistics of the texts, judge scores, win rates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed

from ...data import HUMAN
from .. import judging
from ..coherence import backbone_embedder, coherence
from ..decoding import sequence_rewards
from ..likelihood import make_texts
from ..prompts import second_turn
from ..text import diversity, mean_length
from .cells import Cell, Store
from .running import Running, device, open_system
from .trained import load_policy, load_reward_model
from .training_run import load_tokenizer

TEXTS = "texts.json"
Row = dict[str, Any]


def folders_of(cell: Cell, store: Store, prefix: str = "") -> dict[str, Path]:
    """Role -> folder of a cell's needs whose role begins with ``prefix``, which is removed."""
    return {
        role.removeprefix(prefix): store.folder(need)
        for role, need in cell.needs.items()
        if role.startswith(prefix)
    }


def texts_of(cell: Cell, store: Store) -> list[Row]:
    """``question``, ``prompt`` (with the preceding turns) and ``text`` of a decode cell."""
    return json.loads((store.folder(cell) / TEXTS).read_text(encoding="utf-8"))


def decode(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: decoder, decoder_options, dtype, questions, count, prompt_tokens, new_tokens,
    batch, temperature, seed, digest. Sampled; an answer ends at the end token or where a Human
    turn begins. MT-Bench's second turn follows the system's own first answer.
    """
    o = cell.options
    running = open_system(o["decoder"], folders_of(cell, store), o["decoder_options"], o["dtype"])
    rows = store.data.questions(
        o["questions"],
        o["count"],
        lambda row: _tokens(running, row["prompt"]) <= o["prompt_tokens"],
    )
    asked = [row["prompt"] for row in rows]
    answers = _answers(running, asked, o, turn=0)
    written = [{"question": q, "prompt": q, "text": t} for q, t in zip(asked, answers, strict=True)]
    if o["questions"] == "mt_bench":
        again = [second_turn(row, text) for row, text in zip(rows, answers, strict=True)]
        answers = _answers(running, again, o, turn=1)
        written += [
            {"question": "\n\n".join(row["turns"]), "prompt": prompt, "text": text}
            for row, prompt, text in zip(rows, again, answers, strict=True)
        ]
    text = json.dumps(written, ensure_ascii=False, indent=0)
    folder.mkdir(parents=True)
    (folder / TEXTS).write_text(text, encoding="utf-8")
    return {"texts": len(written), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _tokens(running: Running, prompt: str) -> int:
    return len(running.tokenizer(prompt)["input_ids"])


def _answers(running: Running, asked: list[str], o: Mapping[str, Any], turn: int) -> list[str]:
    tokenizer, answers = running.tokenizer, []
    for start in range(0, len(asked), o["batch"]):
        set_seed(1_000_003 * o["seed"] + 1009 * turn + start)
        inputs = tokenizer(
            asked[start : start + o["batch"]],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        ).to(running.device)
        ids = running.decode(
            dict(inputs),
            max_new_tokens=o["new_tokens"],
            do_sample=True,
            temperature=o["temperature"] * running.temperature,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [text.split(HUMAN)[0].rstrip() for text in texts]
    return answers


def describe_texts(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """Statistics of the texts; needs texts and backbone, whose hidden states serve as sentence
    embeddings.
    """
    rows = texts_of(cell.needs["texts"], store)
    texts = [row["text"] for row in rows]
    home = store.folder(cell.needs["backbone"])
    embedder = backbone_embedder(load_policy(home).to(device()), load_tokenizer(home))
    return {
        "diversity": diversity(texts),
        "diversity_without_plus_one": diversity(texts, plus_one=False),
        "words": mean_length(texts),
        "empty": sum(not text.strip() for text in texts),
        "coherence": list(coherence(embedder, [row["prompt"] for row in rows], texts)),
    }


def reward(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """The mean score that a reward model gives the texts; needs texts, judge and its backbone."""
    rows = texts_of(cell.needs["texts"], store)
    scores = reward_scores(
        cell, store, [(row["prompt"], row["text"]) for row in rows], cell.options["max_length"]
    )
    mean = judging.bootstrap(scores, lambda rows: sum(rows) / len(rows))
    return {"reward": list(mean), "scores": scores}


def reward_scores(
    cell: Cell, store: Store, rows: list[tuple[str, str]], max_length: int, batch: int = 16
) -> list[float]:
    """Scores of (prompt, response) texts by the need ``judge``, tokenised as in training."""
    home = store.folder(cell.needs["judge_backbone"])
    judge = load_reward_model(store.folder(cell.needs["judge"]), home).to(device())
    tokenizer = load_tokenizer(home)
    texts = [torch.tensor(text.ids) for text in make_texts(rows, tokenizer, max_length)]
    scores: list[float] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        ids = pad_sequence(part, batch_first=True).to(device())
        mask = pad_sequence([torch.ones_like(text) for text in part], batch_first=True)
        scores += sequence_rewards(judge, ids, mask.to(device())).tolist()
    return [round(score, 5) for score in scores]


def compare(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """Win rate of a's texts over b's by the scores that a reward model gave (needs a, b and their
    rewards), or by the endpoint that options name.
    """
    a, b = (texts_of(cell.needs[side], store) for side in "ab")
    asked = [row["question"] for row in a]
    if asked != [row["question"] for row in b]:
        raise RuntimeError("compare: both systems must have answered the same questions")
    texts = [[row["text"] for row in side] for side in (a, b)]
    if url := cell.options.get("url"):
        judge = judging.EndpointJudge(url, cell.options["model"])
        found = judging.compare(judge, asked, *texts)
    else:
        scores = (store.result(cell.needs[f"reward_{side}"])["scores"] for side in "ab")
        verdicts = [(x > y) + 0.5 * (x == y) for x, y in zip(*scores, strict=True)]
        found = judging.win_rate(verdicts, [len(x) - len(y) for x, y in zip(*texts, strict=True)])
    return {
        "wins": found.wins,
        "ties": found.ties,
        "losses": found.losses,
        "win_rate": list(found.win_rate),
        "length_controlled": list(found.length_controlled),
    }
