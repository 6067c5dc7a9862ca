# SPDX-License-Identifier: Apache-2.0
"""``dualhead sample``: responses of a backbone to many prompts, ranked by a scorer, as rows that
``dualhead train`` reads.
"""

from __future__ import annotations

import fcntl
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from ..data import HUMAN, read_jsonl, read_lines
from ..eval.open_prompts import SPLITS, open_prompts
from ..eval.scorers import Scorer, ScorerError, scorer
from ..model.builtin_backbones import backbone_path
from .errors import UserError, argument, one_line
from .models import check_backbone, check_device, loading, quiet_transformers

# Built-in prompts instead of a file: "open" or "open:SPLIT".
OPEN = "open"


def sample(arguments: Namespace) -> None:
    """Sample, score, and append a row for each prompt that is not in the file yet."""
    check_backbone("--backbone", arguments.backbone)
    with argument("--prompts"):
        prompts = load_prompts(arguments.prompts)[: arguments.limit]
    with argument("--scorer"):
        judge = scorer(arguments.scorer, arguments.judge_url)
    source = _source(arguments)
    with _opened(Path(arguments.out)) as file:
        done = _rows_there(file, arguments.out, source)
        left = [prompt for prompt in prompts if _key(prompt) not in done]
        if done:
            print(f"{len(prompts) - len(left)} of {len(prompts)} prompts are in {arguments.out}")
        if left:
            _append(arguments, left, judge, source, file)
    print(f"ranked responses to {len(prompts)} prompts in {arguments.out}; to train on them:")
    print(f"  dualhead train --backbone {arguments.backbone} --data {arguments.out} --output heads")


def load_prompts(name: str) -> list[str | list[dict[str, str]]]:
    """The distinct prompts of a file: messages, or dialogues as text.

    Args:
        name: a .jsonl or .jsonl.gz file whose rows have ``prompt`` (a question, a dialogue or
            messages); any other file with one question per line; or "open" (the training split),
            "open:calibration" or "open:measure".
    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without a prompt, no prompt at all, or a file that cannot be read.
    """
    if name == OPEN or name.startswith(f"{OPEN}:"):
        return [_prompt(text) for text in open_prompts(name.partition(":")[2] or SPLITS[0])]
    if name.endswith((".jsonl", ".jsonl.gz")):
        found = [_prompt_of(row, f"{name}, line {line}") for line, row in read_jsonl(name)]
    else:
        found = [_prompt(line.strip()) for line in read_lines(name) if line.strip()]
    unique = list({_key(prompt): prompt for prompt in found}.values())
    if not unique:
        raise ValueError(f"expected at least one prompt in {name}, got none")
    return unique


def _prompt(text: str) -> str | list[dict[str, str]]:
    dialogue = text.lstrip().startswith(HUMAN.strip())
    return text if dialogue else [{"role": "user", "content": text}]


def _prompt_of(row: dict[str, Any], where: str) -> str | list[dict[str, str]]:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return _prompt(prompt)
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )
    if not prompt or not messages or prompt[-1]["role"] != "user":
        raise ValueError(
            f"{where}: prompt must be a text, or messages that end with a user's message"
        )
    return prompt


def _key(prompt: str | list[dict[str, str]]) -> str:
    return json.dumps(prompt)


def _source(arguments: Namespace) -> str:
    """The settings that produce rows; all rows of a file have the same."""
    names = ("backbone", "scorer", "n", "max_new_tokens", "temperature", "seed")
    return ", ".join(f"{name} {getattr(arguments, name)}" for name in names)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """The file, locked, for reading and appending. An incomplete last line is removed."""
    with argument("--out"):
        if path.suffix != ".jsonl":
            raise ValueError(f"expected a file that ends in .jsonl, got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: closing a file would try again to write what did not fit on the disk.
        file = open(path, "a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: another run is writing to {path}") from None
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        yield file


def _rows_there(file: FileIO, name: str, source: str) -> set[str]:
    """The prompts whose rows are in the file."""
    done = set()
    file.seek(0)
    for line, text in enumerate(file.read().splitlines(), start=1):
        try:
            row = json.loads(text)
            found, key = row["source"], _key(row["prompt"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"--out: line {line} of {name} is not a row of dualhead sample"
            ) from None
        if found != source:
            raise UserError(
                f"--out: {name} holds rows of another run; expected: {source}, got: {found}"
            )
        done.add(key)
    return done


def _append(arguments: Namespace, prompts: list, judge: Scorer, source: str, file: FileIO) -> None:
    with argument():
        quiet_transformers(arguments.backbone)
    check_device(arguments.device)
    model, tokenizer = _load(arguments)
    from tqdm.auto import tqdm

    from ..eval.sampling import batches
    from ..eval.sampling import sample as responses_to

    size = max(1, arguments.batch_size // arguments.n)
    settings = (range(arguments.n), arguments.max_new_tokens, arguments.temperature, arguments.seed)
    with tqdm(desc="prompts", total=len(prompts), dynamic_ncols=True) as bar:
        for batch in batches(prompts, size):
            found = responses_to(model, tokenizer, batch, *settings)
            for prompt, responses in zip(batch, found, strict=True):
                with failing_scorer():
                    row = ranked_row(prompt, responses, judge)
                text = json.dumps(row | {"source": source}, ensure_ascii=False)
                with argument("--out"):
                    _write(file, text.encode() + b"\n")
            with argument("--out"):
                os.fsync(file.fileno())
            bar.update(len(batch))


@contextmanager
def failing_scorer() -> Iterator[None]:
    """A scorer's failure as a :class:`UserError`: it may be a function of the user's."""
    try:
        yield
    except ScorerError as error:
        raise UserError(f"--scorer: {one_line(error)}") from error


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def ranked_row(prompt: Any, responses: list, judge: Scorer) -> dict[str, Any]:
    """The row ``{"prompt", "responses", "scores", "ended"}`` of the responses that are not empty.

    Args:
        prompt: a text, or messages.
        responses: `eval.sampling.Response` objects.
    """
    kept = [response for response in responses if response.text]
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    scores = judge.rewards(question, [response.text for response in kept])
    texts = isinstance(prompt, str)
    return {
        "prompt": prompt,
        "responses": [
            f" {r.text}" if texts else [{"role": "assistant", "content": r.text}] for r in kept
        ],
        "scores": scores,
        "ended": [response.ended for response in kept],
    }


def _load(arguments: Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = arguments.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu" if arguments.device == "auto" else arguments.device
    with loading("--backbone", arguments.backbone):
        path = backbone_path(arguments.backbone)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # CPUs compute bf16 slowly.
        dtype = torch.float32 if device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval().to(device), tokenizer
