# SPDX-License-Identifier: Apache-2.0
"""`DualHeadTrainingArguments`: transformers' TrainingArguments with the paper's defaults and the
options of the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from .losses import (
    GATE_REGULARIZERS,
    LM_REDUCTIONS,
    PREFERENCE_DISTRIBUTIONS,
    PREFERENCE_REDUCTIONS,
    LossOptions,
)

# Options of the objective that the model knows and the arguments don't repeat.
_OF_THE_MODEL = ("mix", "logit_scale", "logit_softcap")


def _option(name: str, text: str, choices: Any = None) -> Any:
    """A field whose default is that of `LossOptions`."""
    metadata = {"help": text}
    if choices is not None:
        metadata["choices"] = sorted(choices)
    return field(default=getattr(LossOptions, name), metadata=metadata)


@dataclass
class DualHeadTrainingArguments(TrainingArguments):
    """Arguments of :class:`dualhead_ext.DualHeadTrainer`: every one of
    ``transformers.TrainingArguments``, and those below.

    Other defaults than transformers': cosine schedule, one epoch, an effective batch of 64 pairs (8
    times 8 accumulated) for one process, no filter for NaN losses, ``data_seed`` = ``seed``.

    Raises:
        ValueError, TypeError: an option out of range; something that is not supported (DeepSpeed,
            FSDP, ``torch.nn.DataParallel``, pushing checkpoints).
    """

    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "The learning rate schedule."}
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Times through the training pairs."}
    )
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Pairs per process and forward pass."}
    )
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Forward passes per optimizer step."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between logs."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses by earlier ones in train_loss."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter has a gradient in each step."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The collator picks the columns it needs."}
    )

    beta_r: float = _option("beta_r", "Scales the preference margin, once.")
    lambda_r: float = _option("lambda_r", "Weight of the preference term.")
    lambda_g: float = _option("lambda_g", "Weight of the gate's regulariser.")
    gate_regularizer: str = _option(
        "gate_regularizer",
        "entropy: keeps alpha off 0 and 1; entropy_as_printed: the paper's sign; none.",
        GATE_REGULARIZERS,
    )
    lm_reduction: str = _option(
        "lm_reduction", "sum: per sequence; mean: per token.", LM_REDUCTIONS
    )
    pref_on: str = _option(
        "pref_on",
        "reward: the reward head's distribution; mixed: the mixture, so that the gate sees the "
        "rejected responses too.",
        PREFERENCE_DISTRIBUTIONS,
    )
    pref_reduction: str = _option(
        "pref_reduction",
        "sum: of a response's log-probabilities; mean: normalised by its length.",
        PREFERENCE_REDUCTIONS,
    )
    gamma: float = _option("gamma", "Target margin, subtracted from the scaled one.")
    label_smoothing: float = _option(
        "label_smoothing", "Share of pairs taken to be labelled the wrong way round."
    )
    lm_on_chosen: bool = _option(
        "lm_on_chosen", "Train the language model term on the chosen responses."
    )
    objective_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward head in the language model term; default 1/K."},
    )
    train_lm_head: bool = field(default=False, metadata={"help": "Train the LM head too."})
    untie: bool = field(
        default=False,
        metadata={"help": "Give the LM head a weight of its own if it shares the embedding's."},
    )
    max_length: int = field(
        default=512, metadata={"help": "Tokens per text; longer prompts lose their beginning."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Train on packed batches: the backbone computes nothing for padding."},
    )

    def __post_init__(self) -> None:
        if self.data_seed is None:
            self.data_seed = self.seed
        super().__post_init__()
        _ = self.loss_options
        for name, wanted, reason in (
            ("deepspeed", None, "is not supported"),
            ("label_smoothing_factor", 0, "is transformers' own; use label_smoothing"),
            ("push_to_hub", False, "would push no heads; use model.push_to_hub after training"),
        ):
            if (got := getattr(self, name)) != wanted:
                raise ValueError(f"DualHeadTrainingArguments: {name}={got!r} {reason}")
        if self.fsdp:
            raise ValueError(f"DualHeadTrainingArguments: fsdp={self.fsdp!r} is not supported")
        if self.max_length < 2:
            raise ValueError(
                f"DualHeadTrainingArguments: max_length must be at least 2, got {self.max_length}"
            )

    @property
    def loss_options(self) -> LossOptions:
        """The objective's options; those of the model at their defaults."""
        names = [f.name for f in fields(LossOptions) if f.name not in _OF_THE_MODEL]
        return LossOptions(**{name: getattr(self, name) for name in names})

    def loss_arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of ``dual_head_loss``, without the model's own."""
        options = {f.name: getattr(self.loss_options, f.name) for f in fields(LossOptions)}
        options = {name: value for name, value in options.items() if name not in _OF_THE_MODEL}
        return options | {"objective_weights": self.objective_weights}
