# SPDX-License-Identifier: Apache-2.0
"""A Trainer that reads the hidden states of its rows from a :mod:`dualhead_ext.train.hidden_cache`.

The rows of a data loader carry their hidden states, the collator pads them, and the model's forward
uses them instead of running the backbone; no other code depends on the cache.
"""

from __future__ import annotations

import os
import urllib.parse
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import IterableDataset

from ..model.shards import is_sharded
from .checkpointing import CheckpointedTrainer
from .hidden_cache import (
    AUTO,
    IN_MEMORY,
    CachedRows,
    MemoryCache,
    backbone_identity,
    collator_identity,
    rows_identity,
    split_rows,
)
from .hidden_cache_build import open_or_build


class CachingTrainer(CheckpointedTrainer):
    """``cache_hidden`` of :class:`dualhead_ext.DualHeadTrainer`."""

    _max_length: int
    _backbone: tuple[Any, str] | None = None  # its state when last hashed, and the hash
    _memory: dict[str, tuple[Any, MemoryCache]]  # dataset -> identity of its inputs, hidden states

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As :meth:`CheckpointedTrainer.train`, after filling the cache."""
        if self.args.cache_hidden is not None:
            self.cache_hidden()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def cache_hidden(self) -> None:
        """Cache the hidden states of train_dataset and of every eval_dataset that are not yet in
        ``args.cache_hidden``.

        Raises:
            OSError: too little disk space, in which case nothing was written, or another disk
                error.
            ValueError: ``args.cache_hidden`` is None.
        """
        if self.args.cache_hidden is None:
            raise ValueError("DualHeadTrainer.cache_hidden: args.cache_hidden must not be None")
        if self.train_dataset is not None:
            self.get_train_dataloader()
        held_out = self.eval_dataset
        if held_out is not None:
            for name in held_out if isinstance(held_out, dict) else [None]:
                self.get_eval_dataloader(name)

    def _keeps_in_memory(self, lengths: list[tuple[int, ...]], is_training: bool) -> bool:
        """Whether the states are kept in memory: if ``cache_hidden`` asks for it, or if it is
        "auto", the states are read more than once and take at most a quarter of the free memory.
        """
        args = self.args
        if args.cache_hidden == IN_MEMORY:
            return True
        again = not is_training or args.num_train_epochs > 1 or args.max_steps > 0
        if args.cache_hidden != AUTO or not again or args.world_size > 1:
            return False
        head = self.accelerator.unwrap_model(self.model).lm_head_module
        size = sum(map(sum, lengths)) * head.config.hidden_size
        size *= 2 if args.cache_hidden_dtype == "bfloat16" else head.hidden_dtype.itemsize
        return size <= psutil.virtual_memory().available // 4

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with ``cache_hidden``, the rows carry their hidden states."""
        name = self._cache_name(dataset, kwargs.get("is_training", False))
        if name is None:
            return super()._get_dataloader(dataset, *args, **kwargs)
        digest, lengths = rows_identity(dataset)
        in_memory = self._keeps_in_memory(lengths, kwargs.get("is_training", False))
        if self.args.cache_hidden == AUTO and not in_memory:
            return super()._get_dataloader(dataset, *args, **kwargs)
        rows = CachedRows(dataset)
        loader = super()._get_dataloader(rows, *args, **kwargs)
        sharded = is_sharded(self.accelerator.unwrap_model(self.model))
        own: Any = self.data_collator
        collator = own.collator

        def states_of(batch: list[int]) -> list[Tensor]:
            inputs = self._prepare_inputs(collator([dataset[index] for index in batch]))
            model = self.accelerator.unwrap_model(self.model).eval()
            # FSDP2 has a precision of its own for the layers, as in the forwards that train.
            autocast = nullcontext() if sharded else self.accelerator.autocast()
            with torch.no_grad(), autocast:
                hidden = model.training_hidden_states(**inputs)
            mask = inputs.get("attention_mask")
            sizes = [lengths[index] for index in batch]
            return split_rows(hidden, mask, sizes, ranked="pairs" in inputs)

        if in_memory:
            made_of = (name, digest, self._backbone_state())
            if self._memory.get(name, (None, None))[0] != made_of:
                dtype, progress = self.args.cache_hidden_dtype, not self.args.disable_tqdm
                states = MemoryCache(
                    lengths, _batches(loader), states_of, dtype, progress, together=sharded
                )
                self._memory[name] = made_of, states
            rows.cache = self._memory[name][1]
            return loader
        identity = {
            "backbone": self._backbone_identity(),
            "rows": digest,
            "max_length": self._max_length,
            "collator": collator_identity(collator),
            "mixed_precision": self.accelerator.mixed_precision,
            "cache_hidden_dtype": self.args.cache_hidden_dtype,
        }
        rows.cache = open_or_build(
            os.path.join(self.args.cache_hidden, name),
            identity,
            lengths,
            _batches(loader),
            states_of,
            self.args.cache_hidden_dtype,
            progress=not self.args.disable_tqdm,
            together=sharded,
        )
        return loader

    def _cache_name(self, dataset: Any, is_training: bool) -> str | None:
        """The name of the folder of a dataset's hidden states; None if they are not cached."""
        if self.args.cache_hidden is None or isinstance(dataset, IterableDataset):
            return None
        if is_training:
            return "train" if dataset is self.train_dataset else None
        held_out = self.eval_dataset
        for name, rows in held_out.items() if isinstance(held_out, dict) else [("", held_out)]:
            if rows is dataset:
                return "-".join(filter(None, ("eval", urllib.parse.quote(name, safe=""))))
        return None

    def _backbone_identity(self) -> str:
        """Hashed again only when a parameter has changed: reading all of them takes seconds. Of a
        backbone that will be sharded, before that, on the process that has surely loaded it.
        """
        model = self.accelerator.unwrap_model(self.model)
        now = self._backbone_state()
        if self._backbone is None or self._backbone[0] != now:
            found = [backbone_identity(model) if self.accelerator.is_main_process else None]
            self._backbone = now, broadcast_object_list(found)[0]
        return self._backbone[1]

    def _backbone_state(self) -> list[tuple]:
        """Changes when a parameter of the backbone does. A sharded one stays as it is."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            return []
        return [(p.data_ptr(), p.dtype, p._version) for p in model.get_decoder().parameters()]


def _batches(loader: Any) -> list[list[int]]:
    """The row indices of a fresh loader's first batches on this process, without advancing the
    run's random number generators.
    """
    with torch.random.fork_rng(devices=[]):
        # A loader draws its workers' seed before its sampler draws the order, possibly from the
        # same generator.
        torch.empty((), dtype=torch.int64).random_()
        return [list(batch) for batch in loader.batch_sampler]
