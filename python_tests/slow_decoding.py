# SPDX-License-Identifier: Apache-2.0
"""The slow way to decode: a full pass for each token."""

import torch

NEW = 6


def slow_batch(batch, next_logits):
    """Greedy text of each row alone, without padding. next_logits: a function of its ids (1, T)."""
    texts = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[mask.bool()][None]
        for _ in range(NEW):
            ids = torch.cat((ids, next_logits(ids).argmax(-1, keepdim=True)), 1)
        texts.append(ids[:, -NEW:])
    return torch.cat(texts)
