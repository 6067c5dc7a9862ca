# SPDX-License-Identifier: Apache-2.0
"""`DualHeadTrainingArguments`: transformers' TrainingArguments with presets and the options of the
objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from transformers import TrainingArguments

from ..config import PREFERENCE_NAMES
from ..loss.terms import (
    GATE_REGULARIZERS,
    LM_REDUCTIONS,
    PREFERENCE_DISTRIBUTIONS,
    PREFERENCE_REDUCTIONS,
    LossOptions,
)
from .argument_checks import check_arguments
from .engines import refuse_engines
from .hidden_cache import AS_COMPUTED, AUTO, STORAGE_DTYPES
from .presets import PRESET_NAMES, PRESETS

# Options of the objective that come from the model, not from the arguments.
_OF_THE_MODEL = ("mix", "logit_scale", "logit_softcap")


_FULL_EVAL = "would leave the heads in half precision for further training; use {}=True"


def _option(name: str, text: str, choices: Any = None) -> Any:
    """A field with the default of `LossOptions`."""
    metadata: dict[str, Any] = {"help": text}
    if choices is not None:
        metadata["choices"] = sorted(choices)
    return field(default=getattr(LossOptions, name), metadata=metadata)


def _of_preset(text: str, choices: Any = None) -> Any:
    """A field that takes the preset's value if it is not given."""
    metadata: dict[str, Any] = {"help": f"{text} Default: the preset's."}
    if choices is not None:
        metadata["choices"] = sorted(choices)
    return field(default=None, metadata=metadata)


@dataclass
class DualHeadTrainingArguments(TrainingArguments):
    """Arguments of :class:`dualhead_ext.DualHeadTrainer`: all of
    ``transformers.TrainingArguments``, and those below.

    ``preset`` names a complete recipe (:data:`dualhead_ext.train.presets.PRESETS`); arguments that
    you give override it. These defaults differ from transformers': a cosine schedule, 20 to 40 logs
    per run (each step of a short run), no filter for NaN losses, ``data_seed`` = ``seed``.

    Raises:
        ValueError, TypeError: an option out of range, or one that is not supported (DeepSpeed,
            FSDP1, pushing checkpoints).
    """

    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "The learning rate schedule."}
    )
    preset: str = field(
        default="default",
        metadata={
            "help": "default: token rewards, then calibration; paper: the paper's objective.",
            "choices": list(PRESET_NAMES),
        },
    )
    learning_rate: float | None = _of_preset("Learning rate of the optimizer.")
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the gate, if it differs."}
    )
    num_train_epochs: float | None = _of_preset("Passes over the training rows.")
    per_device_train_batch_size: int | None = _of_preset(
        "Rows (pairs, or ranked lists) per process and forward pass."
    )
    gradient_accumulation_steps: int | None = _of_preset("Forward passes per optimizer step.")
    logging_steps: float = field(
        default=0.025,
        metadata={
            "help": "Optimizer steps between logs, or their share of all steps if below 1. The "
            "default gives 20 to 40 logs per run."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses by earlier ones in train_loss."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter has a gradient in each step."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The collator picks the columns it needs."}
    )

    preference: str | None = _of_preset(
        "token_reward: a response's reward is the sum of its tokens' delta; log_prob: it is the "
        "sum of log-probabilities under the reward head, as in the paper.",
        PREFERENCE_NAMES,
    )
    pref_gate: int | None = _of_preset(
        "1: token rewards are weighted by alpha; 0: they are not.", (0, 1)
    )
    beta_r: float | None = _of_preset("Factor of the preference margin.")
    lambda_r: float = _option("lambda_r", "Weight of the preference term.")
    lambda_g: float | None = _of_preset("Weight of the gate's regulariser.")
    kl_price: float = _option(
        "kl_price", "Weight of the KL divergence from the backbone, per token."
    )
    reward_l2: float | None = _of_preset(
        "Weight of the mean squared token reward. It makes the reward go further at the same KL. "
        "Take 0 with a trainable gate, which otherwise opens on every token."
    )
    gate_regularizer: str | None = _of_preset(
        "entropy: keeps alpha away from 0 and 1; entropy_as_printed: the paper's sign; none.",
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
    gamma: float = _option("gamma", "Target margin, subtracted from the scaled margin.")
    label_smoothing: float = _option(
        "label_smoothing", "Assumed share of pairs with the wrong label."
    )
    lm_on_chosen: bool | None = _of_preset("Train the language model term on the chosen responses.")
    objective_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward head in the language model term; default 1/K."},
    )
    calibrate: bool | None = _of_preset(
        "After training, scale the reward so that strength 1 is 0.1 nats per token, and measure "
        "the curve of strength against KL."
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate after each epoch, stop when the held-out preference loss has not "
            "fallen for this many epochs, and keep the best heads."
        },
    )
    log_kl: bool = field(
        default=False,
        metadata={
            "help": "Also log the KL of the mixture from the backbone on a few held-out states. "
            "With kl_price the KL is logged anyway."
        },
    )
    train_lm_head: bool = field(default=False, metadata={"help": "Train the LM head too."})
    untie: bool = field(
        default=False,
        metadata={"help": "Give an LM head that is tied to the embedding its own weight."},
    )
    max_length: int = field(
        default=512, metadata={"help": "Tokens per text; longer prompts lose their beginning."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Train on packed batches, without padding in the backbone."},
    )
    cache_hidden: str | None = field(
        default=AUTO,
        metadata={
            "help": "Where to cache the backbone's hidden states, so that it runs only once over "
            "the rows: auto (in memory, if they are read again and take at most a quarter of the "
            "free memory), memory, a folder (for later runs too), or none."
        },
    )
    cache_hidden_dtype: str = field(
        default=AS_COMPUTED,
        metadata={
            "help": "auto: stored as the heads read them; bfloat16: half the size of float32.",
            "choices": list(STORAGE_DTYPES),
        },
    )

    def __post_init__(self) -> None:
        refuse_engines("DualHeadTrainingArguments", self)  # which transformers would set up
        if self.preset not in PRESETS:
            raise ValueError(
                "DualHeadTrainingArguments: preset must be one of "
                f"{', '.join(PRESET_NAMES)}, got {self.preset!r}"
            )
        if self.reward_l2 is None and self.preference not in (None, "token_reward"):
            self.reward_l2 = 0.0  # a preset's is for token rewards
        for name, value in PRESETS[self.preset]["training"].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.early_stopping_patience is not None:
            self._stop_early()
        if self.data_seed is None:
            self.data_seed = self.seed
        _ = self.loss_options  # checked there
        check_arguments(self, left_out={f.name for f in fields(LossOptions)})
        weights = self.objective_weights
        if weights is not None and (isinstance(weights, str) or not _are_numbers(weights)):
            raise TypeError(
                "DualHeadTrainingArguments: objective_weights must be numbers, one per reward "
                f"head, got {weights!r}"
            )
        super().__post_init__()
        if not isinstance(self.lr_scheduler_kwargs or {}, dict):
            raise TypeError(
                "DualHeadTrainingArguments: lr_scheduler_kwargs must be a mapping or JSON of one, "
                f"got {self.lr_scheduler_kwargs!r}"
            )
        if self.optim_args and not all("=" in part for part in self.optim_args.split(",")):
            raise ValueError(
                "DualHeadTrainingArguments: optim_args must be key=value, separated by commas, "
                f"got {self.optim_args!r}"
            )
        for name, wanted, reason in (
            ("label_smoothing_factor", 0, "is transformers' own; use label_smoothing"),
            ("push_to_hub", False, "would push no heads; use model.push_to_hub after training"),
            ("bf16_full_eval", False, _FULL_EVAL.format("bf16")),
            ("fp16_full_eval", False, _FULL_EVAL.format("fp16")),
        ):
            if (got := getattr(self, name)) != wanted:
                raise ValueError(f"DualHeadTrainingArguments: {name}={got!r} {reason}")
        if self.ddp_static_graph:
            raise ValueError(
                "DualHeadTrainingArguments: ddp_static_graph=True is not supported: the heads of "
                "the processes drift apart under it"
            )
        if self.cache_hidden_dtype not in STORAGE_DTYPES:
            raise ValueError(
                "DualHeadTrainingArguments: cache_hidden_dtype must be one of "
                f"{', '.join(STORAGE_DTYPES)}, got {self.cache_hidden_dtype!r}"
            )
        if self.cache_hidden == "none":
            self.cache_hidden = None
        if self.max_length < 2:
            raise ValueError(
                f"DualHeadTrainingArguments: max_length must be at least 2, got {self.max_length}"
            )

    def _stop_early(self) -> None:
        patience = self.early_stopping_patience
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(
                "DualHeadTrainingArguments: early_stopping_patience must be an integer >= 1, "
                f"got {patience!r}"
            )
        self.eval_strategy = self.save_strategy = "epoch"
        self.load_best_model_at_end = True
        self.metric_for_best_model, self.greater_is_better = "preference_loss", False
        if self.save_total_limit is None:
            self.save_total_limit = 1

    @property
    def loss_options(self) -> LossOptions:
        """The options of the objective; those that come from the model have their defaults."""
        names = [f.name for f in fields(LossOptions) if f.name not in _OF_THE_MODEL]
        return LossOptions(**{name: getattr(self, name) for name in names})

    def loss_arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of ``dual_head_loss``, without those of the model."""
        options = {f.name: getattr(self.loss_options, f.name) for f in fields(LossOptions)}
        options = {name: value for name, value in options.items() if name not in _OF_THE_MODEL}
        return options | {"objective_weights": self.objective_weights}


def _are_numbers(values: Any) -> bool:
    return isinstance(values, Iterable) and all(isinstance(value, Real) for value in values)
