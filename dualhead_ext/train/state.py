# SPDX-License-Identifier: Apache-2.0
"""State for exact resumption besides weights and optimizer: random number generators, and a check
that data and order are the same. Also: agreement between processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.stream import TokenizedStream

# The number of evenly spaced rows in a dataset's fingerprint.
_FINGERPRINT_ROWS = 256


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or does not answer. gloo raises a
    plain RuntimeError for it.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


@contextmanager
def agree_on(action: str) -> Iterator[None]:
    """Wait for all processes at the end of the block. If the block failed on any, raise on all."""
    from accelerate.utils import gather_object

    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    problems = gather_object([None if problem is None else str(problem)])
    if problem is not None:
        raise problem
    if any(text is not None for text in problems):
        text = next(text for text in problems if text is not None)
        raise RuntimeError(f"DualHeadTrainer: {action} failed on another process: {text}")


def in_step(work: list[Any], nothing: Any, together: bool) -> list[Any]:
    """Work that ends with ``nothing`` until all processes have as much, where each piece needs all
    of them.
    """
    from accelerate.utils import gather_object

    if not together:
        return work
    return work + [nothing] * (max(gather_object([len(work)])) - len(work))


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators (Python, NumPy, torch) and of its device's."""
    of_numpy: Any = np.random.get_state()
    kind, keys, *rest = of_numpy
    state = {
        "device": device.type,
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def data_state(dataset: Any, args: Any) -> dict[str, Any]:
    """Everything that determines the order of examples: sizes, seeds, and a hash of evenly spaced
    rows, or of the first rows of a stream. args: TrainingArguments.
    """
    streamed = isinstance(dataset, TokenizedStream)
    dataset, examples = (dataset.first_rows, None) if streamed else (dataset, len(dataset))
    return {
        "examples": examples,
        "rows_sha256": _rows_hash(dataset),
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "train_sampling_strategy": str(args.train_sampling_strategy),
        "dataloader_drop_last": args.dataloader_drop_last,
    }


def check_data_state(stored: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise ValueError unless a resumed run would continue with the right next examples. Another
    number of processes must take as many rows per step.
    """
    if stored.get("processes") != current["processes"]:
        stored, current = _by_step(stored), _by_step(current)
    differing = [
        f"{name} was {stored.get(name)!r}, is {value!r}"
        for name, value in current.items()
        if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{where}: cannot be resumed with the same data in the same order: "
            f"{'; '.join(differing)}. ignore_data_skip=True resumes anyway"
        )


def _by_step(state: dict[str, Any]) -> dict[str, Any]:
    names = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    rest = {name: value for name, value in state.items() if name not in names}
    return rest | {"the number of rows a step": math.prod(state[name] for name in names)}


def _rows_hash(dataset: Sequence[dict[str, Any]]) -> str:
    digest, count = hashlib.sha256(), len(dataset)
    shown = min(count, _FINGERPRINT_ROWS)
    for i in range(shown):
        row = dataset[i * (count - 1) // max(shown - 1, 1)]
        digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"DualHeadTrainer: a row of train_dataset holds a {type(value).__name__}")
