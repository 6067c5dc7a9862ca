# SPDX-License-Identifier: Apache-2.0
"""One training step for the benchmark, with the same calls as `trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.collate import PreferenceCollator
from ..model.causal_lm import DualHeadForCausalLM
from ..train.trainer import prepare_for_training
from .training_cases import TrainingCase

# Allowed relative difference of losses and gradients from eager's; logits are bf16.
_TOLERANCE = 5e-2
_LEARNING_RATE, _CLIP_NORM = 5e-5, 1.0

# A batch and the function that computes its loss.
Way = tuple[dict[str, Tensor], Callable[..., Any]]


class Training:
    """A gated model, its optimizer, and one batch on the host, without and with hidden states."""

    def __init__(self, case: TrainingCase, device_type: str) -> None:
        self.device_type = device_type
        self.model = DualHeadForCausalLM.from_backbone(
            case.build(device_type), reward_head="full", gate="attention"
        ).eval()
        prepare_for_training(self.model)
        self._make_heads_differ()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=_LEARNING_RATE, fused=True)
        self.batch = self._on_host(_random_batch(case, self.model.config.vocab_size))
        with self._autocast(), torch.no_grad():
            hidden = self.model.training_hidden_states(**self._on_device(self.batch)).cpu()
        self.cached = self._on_host(self.batch | {"hidden_states": hidden})

    @torch.no_grad()
    def _make_heads_differ(self) -> None:
        """Change the reward head: while it equals the LM head, the gate's gradient is 0."""
        head = self.model.lm_head_module
        weight = head.reward_head.weight
        weight.add_(torch.randn_like(weight), alpha=0.3 * weight.std().item())
        head.gate.out_weight.normal_(std=0.1)

    def _on_host(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pinned = self.device_type == "cuda"  # as Trainer's loaders do
        return {name: x.pin_memory() if pinned else x for name, x in batch.items()}

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.device_type, non_blocking=True) for name, x in batch.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, torch.bfloat16)

    def forward(self) -> Tensor:
        """The backbone's forward pass alone; returns the hidden states (2P, T, d)."""
        with self._autocast(), torch.no_grad():
            return self.model.training_hidden_states(**self._on_device(self.batch))

    def backward(self, batch: dict[str, Tensor], loss: Callable[..., Any]) -> Tensor:
        """A forward and a backward pass with ``loss`` as the loss function; returns the loss."""
        with self._autocast():
            value = self.model(**self._on_device(batch), loss_options={"impl": loss}).loss
        value.backward()
        return value.detach()

    def step(self, batch: dict[str, Tensor], loss: Callable[..., Any]) -> None:
        """One whole training step."""
        self.backward(batch, loss)
        torch.nn.utils.clip_grad_norm_(self.trained, _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, batch: dict[str, Tensor], loss: Callable[..., Any]) -> list[Tensor]:
        """The loss and the gradients of one pass; the gradients are then deleted."""
        found = [self.backward(batch, loss), *(p.grad for p in self.trained)]
        self.optimizer.zero_grad()
        return found

    def held_bytes(self) -> int:
        """Bytes of the model and of the optimizer's state."""
        kept = [x for s in self.optimizer.state.values() for x in s.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *kept]
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def _random_batch(case: TrainingCase, vocab_size: int) -> dict[str, Tensor]:
    length = case.prompt_tokens + case.response_tokens
    ids = torch.randint(vocab_size, (case.pairs, 2, length)).tolist()
    mask = [0] * case.prompt_tokens + [1] * case.response_tokens
    sides = ("chosen", "rejected")
    rows = [
        {f"{side}_input_ids": of_side for side, of_side in zip(sides, of_pair, strict=True)}
        | {f"{side}_completion_mask": mask for side in sides}
        for of_pair in ids
    ]
    return PreferenceCollator(pad_token_id=0)(rows)


def check_agreement(training: Training, ways: dict[str, Way]) -> None:
    """Raise RuntimeError unless losses and gradients agree with those of ``eager``."""
    expected = training.gradients(*ways["eager"])
    for name in [name for name in ways if name != "eager"]:
        for got, right in zip(training.gradients(*ways[name]), expected, strict=True):
            error = ((got - right).norm() / right.norm()).item()
            if not error <= _TOLERANCE:
                raise RuntimeError(f"benchmark: a step of {name} and eager's differ by {error:.2g}")
