# SPDX-License-Identifier: Apache-2.0
"""A Trainer for data that are not in memory: an ``IterableDataset``, tokenised on the fly."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from ..data.stream import TokenizedStream
from .caching import CachingTrainer
from .hidden_cache import AUTO


class StreamingTrainer(CachingTrainer):
    """The support of ``IterableDataset`` in :class:`dualhead_ext.DualHeadTrainer`."""

    _tokenizer: Any  # processing_class
    _max_length: int | None

    def _streamed(self, name: str, rows: IterableDataset, args: Any) -> TokenizedStream:
        """The part of a stream that this process trains on. Only train_dataset may be a stream.

        Raises:
            ValueError: an option that a stream does not support; the message says what to do.
        """
        if name != "train_dataset":
            raise ValueError(
                f"DualHeadTrainer: {name} must have a length, got a stream; take a part of it, for "
                "example list(stream.take(500))"
            )
        if args.max_steps <= 0:
            raise ValueError(
                "DualHeadTrainer: max_steps must be given for a stream, whose length is not known, "
                f"got {args.max_steps}"
            )
        if args.cache_hidden not in (None, AUTO):
            raise ValueError(
                f"DualHeadTrainer: cache_hidden={args.cache_hidden!r} needs a train_dataset with a "
                "length, got a stream; leave it out, or load a part of the stream"
            )
        if args.dataloader_num_workers:
            raise ValueError(
                "DualHeadTrainer: dataloader_num_workers must be 0 for a stream, which each "
                f"process reads in order, got {args.dataloader_num_workers}"
            )
        tokenizer, length = self._tokenizer, self._max_length
        shares = (args.process_index, args.world_size)
        return TokenizedStream(f"DualHeadTrainer: {name}", rows, tokenizer, length, *shares)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; but a stream is already split by process."""
        if not isinstance(dataset, TokenizedStream):
            return super()._get_dataloader(dataset, *args, **kwargs)
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )


def first_rows(rows: Any, count: int) -> Any:
    """``rows`` if they have a length; the first ``count`` rows of a stream."""
    return rows.first(count) if isinstance(rows, TokenizedStream) else rows
