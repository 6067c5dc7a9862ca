# SPDX-License-Identifier: Apache-2.0
"""Hidden states of a frozen backbone, computed once and read from disk in later epochs and runs.

    DIR/train/index.json        identity, shapes, sizes; written last, atomically
    DIR/train/hidden-1f2e3d4c-0-00000.safetensors
                                hidden (tokens, d), rows (n,); named by build, process, number
    DIR/train/.lock             held while a cache is being built

For each row a shard holds the hidden states of its texts, concatenated without padding: the chosen
text of a pair, then the rejected one; the responses of a ranked list. A folder is a valid cache if
its index agrees with the request (backbone, rows, tokenisation, collation, precision), with the
size and shape of each file, and holds each row once. Otherwise it is rebuilt, and one sentence says
why. A shard is checked against its SHA-256 when its first row is read, since reading all shards at
each start would cost the time that the cache saves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collate import batch_order, texts_of
from ..files.foreign import brief
from .state import in_step

FORMAT, FORMAT_VERSION = "dualhead-hidden-states", 2
INDEX_NAME = "index.json"
# Values of ``cache_hidden`` that are not folders. "auto" is in memory if that pays.
IN_MEMORY, AUTO = "memory", "auto"
AS_COMPUTED = "auto"
# Storage dtype: as the heads read the states, or bfloat16, which halves the size of float32.
STORAGE_DTYPES = (AS_COMPUTED, "bfloat16")

SHARD_NAME = re.compile(r"hidden-[0-9a-f]{8}-\d{1,6}-\d{5,9}\.safetensors")
# Keys of a backbone's configuration that do not affect its hidden states.
_LEFT_OUT = ("transformers_version", "_name_or_path", "use_cache")


class UnusableCacheError(ValueError):
    """A folder is not a complete cache of the requested hidden states. The message says why."""


# --- identity -------------------------------------------------------------------------------------


def backbone_identity(model: Any) -> str:
    """A hash of everything that determines hidden states: architecture, configuration, all
    parameters and buffers of the decoder.
    """
    decoder, config = model.get_decoder(), model.config
    known = {k: v for k, v in config.to_diff_dict().items() if k not in _LEFT_OUT}
    known |= {"class": type(decoder).__name__, "attention": config._attn_implementation}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def rows_identity(rows: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, ...]]]:
    """(a hash of all tokens, the number of tokens in each text of each row)."""
    digest, lengths = hashlib.sha256(), []
    for index in range(len(rows)):
        texts = [torch.tensor(tokens) for tokens, _ in texts_of(rows[index])]
        lengths.append(tuple(map(len, texts)))
        digest.update(f"{lengths[-1]}".encode())
        for tokens in texts:
            digest.update(tokens.to(torch.int64).numpy().data)
    return digest.hexdigest()[:32], lengths


def collator_identity(collator: Any) -> str:
    """The collator's class and plain options: ``PreferenceCollator(pad_token_id=0, ...)``."""
    plain = (bool, int, float, str, type(None))
    options = getattr(collator, "__dict__", {}).items()
    shown = ", ".join(f"{k}={v!r}" for k, v in sorted(options) if isinstance(v, plain))
    return f"{type(collator).__qualname__}({shown})"


def split_rows(
    hidden: Tensor,
    attention_mask: Tensor | None,
    lengths: list[tuple[int, ...]],
    ranked: bool = False,
) -> list[Tensor]:
    """Split the hidden states of a collator's batch by rows of data: (tokens of all texts, d) each.

    Args:
        hidden: padded (R, T, d), or packed (1, N, d) without a mask.
        lengths: tokens in each text of each row.
        ranked: whether the rows are ranked lists, which determines the order of the texts
            (:func:`dualhead_ext.data.collate.batch_order`).
    Raises:
        ValueError: the batch has another number of tokens than ``lengths``.
    """
    states = hidden.flatten(0, 1) if attention_mask is None else hidden[attention_mask.bool()]
    order = batch_order(ranked, [len(row) for row in lengths])
    sizes = [lengths[row][text] for row, text in order]
    if len(states) != sum(sizes):
        raise ValueError(
            f"cache_hidden: {len(lengths)} rows have {sum(sizes)} tokens, the collator's batch of "
            f"them {len(states)}"
        )
    parts = dict(zip(order, states.split(sizes), strict=True))
    return [
        torch.cat([parts[row, text] for text in range(len(texts))])
        for row, texts in enumerate(lengths)
    ]


# --- reading --------------------------------------------------------------------------------------


class HiddenCache:
    """A complete, memory-mapped cache: ``cache[i]`` gives the hidden states of row i.

    Args:
        folder: of the cache.
        identity: the required identity.
        lengths: tokens in each text of each row.
    Raises:
        UnusableCacheError: the folder is not a complete cache with this identity; or, when a row is
            read, its shard has changed.
        OSError: it cannot be read.
    """

    def __init__(
        self, folder: str | os.PathLike, identity: dict[str, Any], lengths: list[tuple[int, ...]]
    ) -> None:
        self._made_from = (folder, identity, lengths)
        index = _read_index(Path(folder))
        differing = [
            f"{name} was {brief(index['identity'].get(name))}, is {brief(value)}"
            for name, value in identity.items()
            if index["identity"].get(name) != value
        ]
        if differing:
            raise UnusableCacheError("; ".join(differing))
        self.dtype: torch.dtype = getattr(torch, index["computed_dtype"])
        self._lengths = lengths
        self._where: dict[int, tuple[_Shard, int]] = {}
        for entry in index["shards"]:
            self._open_shard(Path(folder) / entry["name"], entry, index)
        if len(self._where) != len(lengths):
            raise UnusableCacheError(f"{len(lengths) - len(self._where)} rows are missing")

    def _open_shard(self, path: Path, entry: dict[str, Any], index: dict[str, Any]) -> None:
        from safetensors import SafetensorError, safe_open

        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            raise UnusableCacheError(
                f"{path.name} had {brief(entry['size'])} bytes, has {size or 'none'}"
            )
        try:
            with safe_open(path, framework="pt") as file:  # maps it; nothing is read yet
                hidden, rows = file.get_tensor("hidden"), file.get_tensor("rows").tolist()
        except (OSError, SafetensorError) as error:
            raise UnusableCacheError(f"{path.name} is damaged ({brief(error)})") from None
        shard, start = _Shard(path, entry["sha256"], hidden), 0
        for row in rows:
            if row in self._where or not 0 <= row < len(self._lengths):
                raise UnusableCacheError(f"{path.name} holds row {row}, which belongs elsewhere")
            self._where[row] = (shard, start)
            start += sum(self._lengths[row])
        shape, dtype = [start, index["hidden_size"]], getattr(torch, index["dtype"])
        if not (shape == entry["shape"] == list(hidden.shape) and hidden.dtype == dtype):
            raise UnusableCacheError(f"{path.name} has another shape or dtype than in the index")

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        """The hidden states (tokens, d) of each text of a row, in the stored dtype."""
        (shard, start), sizes = self._where[row], self._lengths[row]
        return shard.states()[start : start + sum(sizes)].split(sizes)

    def __reduce__(self) -> tuple:
        """For spawned worker processes, which map the files themselves."""
        return HiddenCache, self._made_from


class _Shard:
    """The hidden states of one file. The file's hash is checked once, at the first read."""

    def __init__(self, path: Path, sha256: str, hidden: Tensor) -> None:
        self._path, self._sha256, self._hidden = path, sha256, hidden
        self._checked = False

    def states(self) -> Tensor:
        """(tokens, d)."""
        if not self._checked:
            if _sha256(self._path) != self._sha256:
                raise UnusableCacheError(
                    f"{self._path}: has changed since it was written (its SHA-256 does not match); "
                    f"remove {self._path.parent} to compute the hidden states again"
                )
            self._checked = True
        return self._hidden


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX_NAME).read_bytes())
    except FileNotFoundError:
        raise UnusableCacheError("its index is missing: its build was interrupted") from None
    except (ValueError, RecursionError):
        raise UnusableCacheError("its index is damaged") from None
    named = isinstance(index, dict) and (index.get("format"), index.get("format_version"))
    if named and named != (FORMAT, FORMAT_VERSION):
        raise UnusableCacheError("its index is of another format or version")
    if not named or not _is_whole(index):
        raise UnusableCacheError("its index is damaged")
    return index


def _is_whole(index: dict[str, Any]) -> bool:
    """Whether an index has all keys with the right types, and no shard's name leads out of its
    folder.
    """
    kinds = {"identity": dict, "hidden_size": int, "shards": list}
    if not all(isinstance(index.get(name), kind) for name, kind in kinds.items()):
        return False
    dtypes = (getattr(torch, str(index.get(name)), None) for name in ("dtype", "computed_dtype"))
    return all(isinstance(dtype, torch.dtype) for dtype in dtypes) and all(
        isinstance(entry, dict)
        and SHARD_NAME.fullmatch(str(entry.get("name")))
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("shape"), list)
        for entry in index["shards"]
    )


class MemoryCache:
    """Hidden states of the rows of a dataset, in memory.

    Args:
        lengths: tokens in each text of each row.
        batches: rows to compute together; rows in no batch are added at the end.
        states_of: maps the rows of a batch to the hidden states (tokens of all texts, d) of each.
        dtype: one of `STORAGE_DTYPES`. progress: show a bar.
        together: ``states_of`` needs all processes at once.
    """

    def __init__(
        self,
        lengths: list[tuple[int, ...]],
        batches: list[list[int]],
        states_of: Callable[[list[int]], list[Tensor]],
        dtype: str = AS_COMPUTED,
        progress: bool = False,
        together: bool = False,
    ) -> None:
        self._lengths = lengths
        self._states: list[Tensor | None] = [None] * len(lengths)
        size = len(batches[0]) if batches else 1
        rest = sorted(set(range(len(lengths))).difference(*batches))
        rest_batches = [rest[i : i + size] for i in range(0, len(rest), size)]
        work = in_step([*batches, *rest_batches], [0], together)
        bar = tqdm(work, "hidden states", disable=not progress)
        for batch in bar:
            for row, states in zip(batch, states_of(batch), strict=True):
                if self._states[row] is None:
                    self.dtype = states.dtype
                    stored = states.dtype if dtype == AS_COMPUTED else getattr(torch, dtype)
                    self._states[row] = states.to("cpu", stored)

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        """The hidden states (tokens, d) of each text of a row, in the stored dtype."""
        return self._states[row].split(self._lengths[row])


class CachedRows(torch.utils.data.Dataset):
    """Rows of a dataset with their hidden states under ``hidden_states``. Set ``cache`` first."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        self.cache: HiddenCache | MemoryCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        states = (self.cache[index], self.cache.dtype)
        return {**self.rows[index], "hidden_states": states}


class HiddenCollator:
    """A collator that adds ``hidden_states`` to its batches if the rows have them: (R, T, d) with
    zeros at padding, or packed (1, N, d).
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = [row["hidden_states"] for row in rows if "hidden_states" in row]
        if not found:
            return self.collator(rows)
        without = [{k: v for k, v in row.items() if k != "hidden_states"} for row in rows]
        batch = self.collator(without)
        order = batch_order("pairs" in batch, [len(texts) for texts, _ in found])
        states = torch.cat([found[row][0][text] for row, text in order])
        mask = batch.get("attention_mask")  # none: packed
        mask = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
        hidden = torch.zeros(*mask.shape, states.shape[1], dtype=found[0][1])
        hidden[mask] = states.to(hidden.dtype)
        return {**batch, "hidden_states": hidden}
