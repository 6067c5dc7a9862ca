# SPDX-License-Identifier: Apache-2.0
"""Settings of the comparisons as plain data: backbones, trainings, variants of the gated head.
Needs the standard library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

ARCHITECTURES = ("llama", "mistral")


@dataclass(frozen=True)
class BackboneSpec:
    """A small backbone and its pre-training. The defaults are those of the built-in backbone.

    Args:
        architecture: ``"llama"`` or ``"mistral"``.
        hidden_size, layers, heads, intermediate: the decoder's sizes.
        kv_heads: number of key and value heads; default ``heads``, for Mistral half of it.
        max_position_embeddings: maximum length of a text in tokens.
        context: tokens of a training row.
        batch_size: rows of an optimizer step.
        epochs: passes over the text; ``max_steps`` overrides it.
        learning_rate: the peak, reached after 100 warm-up steps (at most a tenth of all steps) and
            followed by cosine decay.
        bf16: whether to use bf16 autocast; a CPU without AMX is faster without it.

    Raises:
        ValueError: another architecture, a size below 1, heads that do not divide the hidden size.
    """

    architecture: str = "llama"
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    intermediate: int = 704
    kv_heads: int | None = None
    max_position_embeddings: int = 1024
    context: int = 512
    batch_size: int = 8
    epochs: int = 6
    max_steps: int | None = None
    learning_rate: float = 1.5e-3
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"BackboneSpec: architecture must be one of {', '.join(ARCHITECTURES)}, "
                f"got {self.architecture!r}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("architecture", "bf16") or value is None:
                continue
            if not value > 0:
                raise ValueError(f"BackboneSpec: {field.name} must be above 0, got {value}")
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                f"BackboneSpec: heads must divide hidden_size, and kv_heads heads, got "
                f"{self.hidden_size}, {self.heads} and {self.key_value_heads}"
            )
        if self.context >= self.max_position_embeddings:
            raise ValueError(
                f"BackboneSpec: context must be below max_position_embeddings "
                f"{self.max_position_embeddings}, got {self.context}"
            )

    @property
    def key_value_heads(self) -> int:
        if self.kv_heads is not None:
            return self.kv_heads
        return self.heads if self.architecture == "llama" else max(1, self.heads // 2)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainSettings:
    """Settings common to every training on preference pairs: AdamW (0.9, 0.999) in fp32.

    Args:
        learning_rate: the peak. The default suits models of a few million parameters; a 7B model
            needs far less.
        epochs: passes over the pairs; ``max_steps`` overrides it.
        batch_size: pairs of an optimizer step.
        micro_batch_size: pairs of a forward and backward pass; default ``batch_size``.
        max_length: maximum tokens of a text; longer prompts are cut at the beginning.
        seed: seed of the initial weights and of the order of the pairs.
        beta: scales the preference margin (or a KL penalty); None uses the method's value in
            `BETAS`. Reward models have none.
        warmup: number of warm-up steps, or their share of all steps if below 1.
        scheduler: name of a learning rate schedule of transformers.
        weight_decay: weight decay of AdamW.
        lora: train an adapter instead of all weights, with ``lora_rank`` and ``lora_alpha`` on
            ``lora_targets`` (PEFT's names, or ``"all-linear"``: every linear layer except the
            head). Ignored by the gated head, which never trains its backbone.
        bf16: whether to use bf16 autocast; a CPU without AMX is faster without it. Trained weights
            stay fp32.
        logging_steps: optimizer steps between log entries.

    Raises:
        ValueError: a number out of range.
    """

    learning_rate: float = 1e-3
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_length: int = 256
    seed: int = 0
    beta: float | None = None
    warmup: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    lora: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: str | tuple[str, ...] = "all-linear"
    bf16: bool = False
    logging_steps: int = 1

    def __post_init__(self) -> None:
        above_zero = ("learning_rate", "epochs", "max_steps", "batch_size", "micro_batch_size")
        for name in (*above_zero, "beta", "lora_rank", "lora_alpha", "logging_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainSettings: {name} must be above 0, got {value}")
        if self.max_length < 2:
            raise ValueError(f"TrainSettings: max_length must be at least 2, got {self.max_length}")
        if self.batch_size % self.pairs_at_once:
            raise ValueError(
                f"TrainSettings: micro_batch_size must divide batch_size {self.batch_size}, "
                f"got {self.micro_batch_size}"
            )

    @property
    def pairs_at_once(self) -> int:
        return self.micro_batch_size or self.batch_size

    def beta_of(self, method: str) -> float:
        """``beta``, or the method's default."""
        return BETAS[method] if self.beta is None else self.beta

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


# Default beta of each method: from the dual head's default, GenARM's HH script, the papers of DPO
# and SimPO, and TRL.
BETAS = {"dual_head": 0.1, "autoregressive_reward": 0.05, "dpo": 0.1, "simpo": 2.0, "rloo": 0.05}

# The gated head and its ablations, which change one thing at a time: options of
# training.train_dual_head. Two variants have one attention head: one with the same number of
# parameters (384 = 8 x 48 wide), one with the same head size. "lm_sum" sums the language model loss
# as in the paper, which then dominates the preference loss. The "pref_mean" variants average the
# preference loss over tokens (beta_r as in SimPO), because a difference of sums mostly reflects
# lengths and saturates the sigmoid: on the reward head alone, and on the mixture, so that the gate
# gets a gradient from the rejected side.
DUAL_HEAD_VARIANTS: dict[str, dict[str, Any]] = {
    "dual_head": {},
    "probs_mix": {"mix": "probs"},
    "fixed_gate": {"gate": "fixed", "gate_alpha": 0.5},
    "linear_gate": {"gate": "linear"},
    "no_regularizer": {"gate_regularizer": "none"},
    "printed_sign": {"gate_regularizer": "entropy_as_printed"},
    "pref_on_mixed": {"pref_on": "mixed"},
    "single_head_equal_parameters": {"gate_num_heads": 1, "gate_head_dim": 384},
    "single_head_equal_size": {"gate_num_heads": 1, "gate_head_dim": 48},
    "lm_sum": {"lm_reduction": "sum"},
    "pref_mean": {"pref_reduction": "mean", "beta_r": 2.0},
    "pref_mean_on_mixed": {"pref_reduction": "mean", "beta_r": 2.0, "pref_on": "mixed"},
}
