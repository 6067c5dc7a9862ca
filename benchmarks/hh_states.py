# SPDX-License-Identifier: Apache-2.0
"""Human preference pairs as tokens, and the backbone's hidden states at their responses, kept in a
folder: what the rewards of hh_pairs.py read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from dualhead_ext.data import load_preference_data
from dualhead_ext.data.collate import texts_of, tokenize_pairs
from dualhead_ext.eval.metrics import text_length
from dualhead_ext.files.atomic import write_durably

# Pairs in a file of states and in a forward pass. Tokens of a prompt that are kept at least.
SHARD, BATCH, PROMPT = 100, 4, 64
SUBSETS = ("helpful-base", "harmless-base")
SIDES = ("chosen", "rejected")


@dataclass
class Pair:
    """A prompt and its two responses as tokens, the chosen one first.

    Attributes:
        spoken: 1 for a response's tokens that the assistant says.
        characters: of each response.
        states: for each of the n tokens of a response, and for the prompt's last token before them,
            the backbone's hidden state, (n + 1, d).
        log_probs: of each response's tokens under the backbone, (n,); of test pairs only.
    """

    subset: str
    prompt: list[int]
    responses: list[list[int]]
    spoken: list[list[int]]
    characters: list[int]
    states: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    def texts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each response: its n spoken tokens, the states before each (n, d) and after each."""
        for ids, spoken, states in zip(self.responses, self.spoken, self.states, strict=True):
            at = torch.tensor(spoken).nonzero()[:, 0]
            yield torch.tensor(ids)[at], states[at].float(), states[at + 1].float()


def read_pairs(
    path: Path,
    tokenizer: Any,
    max_length: int,
    count: int | None = None,
    longest: int | None = None,
) -> list[Pair]:
    """The pairs of a file. Long prompts lose their beginning; responses stay whole.

    Args:
        max_length: of the prompt with the longer response, in tokens.
        count: the first rows only.
        longest: without the pairs of which the prompt and both responses have more tokens.
    """
    rows = load_preference_data(path)[:count]
    coded, found = tokenize_pairs(rows, tokenizer, max_length=2**20), []
    for row, tokens in zip(rows, coded, strict=True):
        (ids, mask), (others, other_mask) = texts_of(tokens)
        first = mask.index(1)
        assert ids[:first] == others[:first] and other_mask.index(1) == first
        responses, spoken = [ids[first:], others[first:]], [mask[first:], other_mask[first:]]
        kept = max(max_length - max(map(len, responses)), PROMPT)
        characters = [text_length(row[side]) for side in SIDES]
        pair = Pair(row["subset"], ids[:first][-kept:], responses, spoken, characters)
        if longest is None or len(pair) <= longest:
            found.append(pair)
    return found


# --- hidden states --------------------------------------------------------------------------------


@torch.inference_mode()
def states_of(decoder: Any, pairs: Sequence[Pair]) -> list[list[Tensor]]:
    """`Pair.states` of each pair. The prompt, which both responses share, is computed once: the
    responses follow it one after the other, and neither attends to the other.
    """
    longest = max(map(len, pairs))
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    mask = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(pairs), 1, 1, 1)
    for row, pair in enumerate(pairs):
        start, (chosen, rejected) = len(pair.prompt), map(len, pair.responses)
        ids[row, : len(pair)] = torch.tensor([*pair.prompt, *pair.responses[0], *pair.responses[1]])
        places = [*range(start + chosen), *range(start, start + rejected)]
        positions[row, : len(pair)] = torch.tensor(places)
        mask[row, 0, start + chosen :, start : start + chosen] = False
    out = decoder(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    found = []
    for pair, states in zip(pairs, out.last_hidden_state, strict=True):
        before = states[len(pair.prompt) - 1, None]
        rest = states[len(pair.prompt) : len(pair)].split([*map(len, pair.responses)])
        found.append([torch.cat((before, part)) for part in rest])
    return found


@torch.inference_mode()
def log_probs_of(lm_weight: Tensor, ids: list[int], states: Tensor) -> Tensor:
    """`Pair.log_probs` of a response, (n,). lm_weight: (V, d) in float32."""
    logits = F.linear(states[:-1].float(), lm_weight)
    return logits.gather(-1, torch.tensor(ids)[:, None])[:, 0] - logits.logsumexp(-1)


def _files(folder: Path, split: str, pairs: Sequence[Pair]) -> Iterator[tuple[Path, list[int]]]:
    """The files of a split's states and the numbers of the pairs in each, the shortest first."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]))
    for start in range(0, len(order), SHARD):
        yield folder / f"{split}-{start // SHARD:03}.safetensors", order[start : start + SHARD]


def keep_states(model: Any, splits: dict[str, list[Pair]], folder: Path, until: float) -> None:
    """Write the files that are missing in a folder of states.

    Raises:
        SystemExit: the time is over before all are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lm_weight = model.lm_head.weight.float()
    for split, pairs in splits.items():
        for file, rows in _files(folder, split, pairs):
            if file.is_file():
                continue
            if time.monotonic() > until:
                raise SystemExit(f"{file.name} and later ones are missing: run this again")
            begin, found = time.process_time(), {}
            for i in range(0, len(rows), BATCH):
                part = rows[i : i + BATCH]
                states = states_of(model.get_decoder(), [pairs[row] for row in part])
                for row, both in zip(part, states, strict=True):
                    for side, ids, h in zip(SIDES, pairs[row].responses, both, strict=True):
                        found[f"{row}-{side}"] = h.clone()
                        if split == "test":  # for the rules; no reward is trained on them
                            found[f"{row}-{side}-log-probs"] = log_probs_of(lm_weight, ids, h)
            write_durably(file, save(found))
            print(f"{file.name}: {time.process_time() - begin:.0f} s of CPU time", flush=True)


def read_states(splits: dict[str, list[Pair]], folder: Path) -> None:
    """Fill in `Pair.states` and `Pair.log_probs`."""
    for split, pairs in splits.items():
        for file, rows in _files(folder, split, pairs):
            found = load_file(file)
            for row in rows:
                pairs[row].states = [found[f"{row}-{side}"] for side in SIDES]
                if split == "test":
                    pairs[row].log_probs = [found[f"{row}-{side}-log-probs"] for side in SIDES]
