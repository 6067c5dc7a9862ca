# SPDX-License-Identifier: Apache-2.0
"""`DualHeadTrainer`: transformers' Trainer for preference pairs, with a frozen backbone, the loss
inside the model's forward, and crash-safe checkpoints of the heads.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any, cast

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback

from ..data import preference_rows
from ..data.collate import PreferenceCollator, is_tokenized, texts_of, tokenize_pairs
from ..data.files import rows_in
from ..data.stream import TokenizedStream
from ..head.calibration import REQUESTS, calibrate
from ..head.calibration import STATES as CALIBRATION_STATES
from ..loss.pairs import Pairing
from ..loss.terms import UNTAUGHT_GATE, LossCounts, metrics_of_totals
from ..model.causal_lm import DualHeadForCausalLM
from ..model.packing import packed_rows
from ..model.pretrained import untie_lm_head
from ..model.shards import copy_whole, is_sharded, whole_heads
from .arguments import DualHeadTrainingArguments
from .engines import refuse_engines, refuse_ignored_fsdp, refuse_lone_processes
from .gate_probe import ROWS, STATES, GateProbe
from .hidden_cache import AUTO, IN_MEMORY, CachedRows, HiddenCollator
from .sharding import shard
from .state import agree_on
from .streaming import StreamingTrainer, first_rows
from .token_limits import check_limits, row_check

__all__ = ["DualHeadTrainer", "DualHeadTrainingArguments"]

logger = logging.getLogger(__name__)

# A gate has collapsed if more than this share of its tokens has alpha within 0.01 of 0 or 1.
COLLAPSED_SHARE = 0.9


def prepare_for_training(
    model: DualHeadForCausalLM, train_lm_head: bool = False, untie: bool = False
) -> None:
    """Freeze the backbone and make reward heads and gate trainable in fp32 (bf16 weights would lose
    updates to rounding at a learning rate of 5e-5); also the LM head if requested.

    Raises:
        TypeError: the model has no gated head.
        ValueError: the LM head shares the embedding's weight (unless ``untie``, which copies it) or
            is not fp32 or float64.
        RuntimeError: the heads are quantised.
    """
    if not isinstance(model, DualHeadForCausalLM):
        raise TypeError(
            "DualHeadTrainer: model must have a gated head (DualHeadForCausalLM.from_backbone), "
            f"got {type(model).__name__}"
        )
    head = model.lm_head_module
    if head.quantized is not None:
        raise RuntimeError(
            f"DualHeadTrainer: the model's heads are quantised ({head.quantized}), and quantised "
            "heads do not train; train the heads in full precision and quantise them afterwards"
        )
    model.requires_grad_(False)
    for module in (head.reward_head, head.gate):
        module.requires_grad_(True)
        for parameter in module.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    if not train_lm_head:
        return
    if model.get_input_embeddings().weight is head.weight:
        if not untie:
            raise ValueError(
                "DualHeadTrainer: train_lm_head: the LM head shares its weight with the "
                "embedding, which would be trained too; untie=True gives it a copy"
            )
        untie_lm_head(model)
    if head.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "DualHeadTrainer: train_lm_head: the LM head must be float32, "
            f"got {head.weight.dtype}; load the backbone with dtype=torch.float32"
        )
    head.lm_head_trained = True
    head.weight.requires_grad_(True)
    if head.bias is not None:
        head.bias.requires_grad_(True)


class DualHeadTrainer(StreamingTrainer):
    """Train reward heads and gate on preference pairs.

    The data are rows ``{"prompt", "chosen", "rejected"[, "objective"]}``, or ranked lists
    ``{"prompt", "responses", "scores"[, "objective"]}`` (see
    :func:`dualhead_ext.data.load_preference_data`), tokenised here with ``processing_class``, or
    rows that are tokenised already. Everything else is transformers' Trainer: accumulation, mixed
    precision, DDP (torchrun), FSDP2 (:mod:`dualhead_ext.train.sharding`), schedules, callbacks.

    Logs and evaluations hold ``loss``, ``lm_loss``, ``preference_loss``, ``gate_loss`` and the
    metrics that TRL users know (`loss.terms.metrics_of_totals`), as means over all examples of all
    processes since the last log; evaluations have the prefix ``eval_``. The totals of each example
    are in ``predict(...).predictions`` (columns `loss.terms.TOTAL_NAMES`).

    Checkpoints hold the trained heads, optimizer, schedule, random state and progress, but not the
    backbone. :mod:`dualhead_ext.files.checkpoint` writes them without pickle.
    ``train(resume_from_checkpoint=True)`` continues from the last complete checkpoint.

    With ``args.cache_hidden`` the backbone runs once over the rows, in the batches of the first
    epoch and of an evaluation. Its hidden states are kept in memory or in a folder
    (:mod:`dualhead_ext.train.hidden_cache`). In these batches every loss is bitwise identical; in
    other batches it differs by the backbone's own rounding.

    Args:
        model: a :class:`dualhead_ext.DualHeadForCausalLM`; its backbone is frozen, see
            :func:`prepare_for_training`.
        args: :class:`DualHeadTrainingArguments`.
        data_collator: default :class:`dualhead_ext.data.collate.PreferenceCollator`.
        train_dataset, eval_dataset: sequences of rows, a ``datasets.Dataset`` or a pandas DataFrame
            in any layout that the loader knows; eval_dataset may be a dict of them. train_dataset
            may also be an ``IterableDataset`` of torch or of the datasets library: rows are
            tokenised as they are read, row i belongs to process i modulo the number of processes,
            the stream starts again when it ends, and ``args.max_steps`` ends the run.
        processing_class: the tokenizer.
        others: other arguments of ``transformers.Trainer``.
    Raises:
        TypeError: a model without gated head, other arguments, a dataset without length.
        ValueError: rows that need a tokenizer where none is given, an empty dataset, several
            devices in one process, DeepSpeed or FSDP1.
    """

    def __init__(
        self,
        model: DualHeadForCausalLM | None = None,
        args: DualHeadTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        if not isinstance(args, DualHeadTrainingArguments):
            raise TypeError(
                "DualHeadTrainer: args must be DualHeadTrainingArguments, "
                f"got {type(args).__name__}"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"DualHeadTrainer: {args.n_gpu} devices in one process: start one process for each "
                "with torchrun, or show it one with CUDA_VISIBLE_DEVICES"
            )
        if args.early_stopping_patience is not None and eval_dataset is None:
            raise ValueError(
                "DualHeadTrainer: early_stopping_patience needs an eval_dataset of held-out rows, "
                "got None"
            )
        refuse_engines("DualHeadTrainer", args)
        if model is not None:
            prepare_for_training(model, args.train_lm_head, args.untie)
            _check_objective(model, args)
        if data_collator is None:
            data_collator = PreferenceCollator(
                _pad_token_id(processing_class), padding_free=args.padding_free
            )
        elif args.padding_free:
            raise ValueError(
                "DualHeadTrainer: padding_free is an option of the default data_collator, got "
                f"{type(data_collator).__name__}; PreferenceCollator(..., padding_free=True)"
            )
        if args.cache_hidden is not None:
            data_collator = HiddenCollator(data_collator)
        self._tokenizer, self._max_length = processing_class, args.max_length
        if isinstance(train_dataset, IterableDataset):
            train_dataset = self._streamed("train_dataset", train_dataset, args)
        eval_dataset = self._held_out("eval_dataset", eval_dataset)
        self._warned_of_collapse, self._memory = False, {}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._tokenized("train_dataset", train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        refuse_engines("DualHeadTrainer", args, self.accelerator)
        refuse_lone_processes("DualHeadTrainer", self.accelerator)
        refuse_ignored_fsdp("DualHeadTrainer", args, self.accelerator)
        # The loss is divided by the counts of the whole accumulated batch, not per micro-batch.
        # Release 5.17 reads the first, later ones the second.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._check_limits("train_dataset", self.train_dataset)
        self._check_limits("eval_dataset", self.eval_dataset)
        if self.is_fsdp_enabled:
            self._shard()
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def _shard(self) -> None:
        """Split the model over the processes, after all that takes it whole."""
        if self.args.cache_hidden not in (None, AUTO, IN_MEMORY):
            self._backbone_identity()
        shard(self.model, self.accelerator)

    def _tokenized(self, name: str, rows: Any) -> Any:
        """Tokenised and checked rows for the collator; rows already tokenised are unchanged."""
        if rows is None or isinstance(rows, TokenizedStream):
            return rows
        if isinstance(rows, IterableDataset):
            return self._streamed(name, rows, None)
        found = rows_in(rows)
        if found is not None and len(rows) == 0:
            raise ValueError(f"DualHeadTrainer: {name} must hold at least one pair, got none")
        if found is None or not is_tokenized(next(iter(found))[1]):
            rows = preference_rows(rows, f"DualHeadTrainer: {name}")
            if self._tokenizer is None:
                raise ValueError(
                    f"DualHeadTrainer: {name} holds text, which needs processing_class, a tokenizer"
                )
            source = f"DualHeadTrainer: {name}"
            rows = tokenize_pairs(rows, self._tokenizer, self._max_length, source)
        return rows

    def _check_limits(self, name: str, rows: Any) -> None:
        """Raise ValueError for rows with tokens that the backbone's embeddings lack."""
        model = self.accelerator.unwrap_model(self.model)
        collator = getattr(self.data_collator, "collator", self.data_collator)
        pad = getattr(collator, "pad_token_id", None)
        for part in rows.values() if isinstance(rows, dict) else [rows]:
            if isinstance(part, TokenizedStream):
                part.check = row_check(name, model, self._max_length, pad)
                _ = part.first_rows  # raises errors of these rows before training starts
            elif part is not None and rows_in(part) is not None:
                check_limits(name, part, model, self._max_length, pad)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; eval_dataset may hold text, as in the constructor."""
        rows = self._held_out("eval_dataset", eval_dataset)
        if rows is not eval_dataset:
            self._check_limits("eval_dataset", rows)
        return super().evaluate(rows, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; test_dataset may hold text, as in the constructor."""
        rows = self._held_out("test_dataset", test_dataset)
        self._check_limits("test_dataset", rows)
        return super().predict(rows, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(
            self._with_lengths(self.train_dataset if train_dataset is None else train_dataset)
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(self._with_lengths(eval_dataset))

    def _with_lengths(self, rows: Any) -> Any:
        """What transformers reads lengths from, if batches are to hold texts of similar lengths:
        each row as ``input_ids`` as long as its longest text.
        """
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        if strategy not in ("group_by_length", "batch_rebalance") or not hasattr(rows, "__len__"):
            return rows
        names = getattr(self.processing_class, "model_input_names", ["input_ids"])
        rows = rows.rows if isinstance(rows, CachedRows) else rows
        longest = (max(len(tokens) for tokens, _ in texts_of(rows[i])) for i in range(len(rows)))
        return [{names[0]: range(length)} for length in longest]

    def _held_out(self, name: str, rows: Any) -> Any:
        if isinstance(rows, str):  # the name of one of several datasets
            return rows
        if isinstance(rows, dict):
            return {key: self._tokenized(f"{name}[{key!r}]", part) for key, part in rows.items()}
        return self._tokenized(name, rows)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in transformers, with the model prepared for training."""
        model = super().call_model_init(trial)
        gated = cast(DualHeadForCausalLM, model)
        prepare_for_training(gated, self.args.train_lm_head, self.args.untie)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with ``args.calibrate`` the reward is scaled at the end, see
        :meth:`calibrate`.
        """
        self.accelerator.unwrap_model(self.model).dual_head_config.kl_curve = None
        output = super().train(*args, **kwargs)
        if self.args.calibrate:
            self.calibrate()
        return output

    def calibrate(self) -> list[list[float]]:
        """Scale the reward so that strength 1 is 0.1 nats per token, and measure the curve of
        strength against KL (:mod:`dualhead_ext.head.calibration`), on the prompts and responses of
        eval_dataset; where there is none, of train_dataset, and a warning says so. Returns the
        curve.
        """
        held_out = self.eval_dataset
        rows = next(iter(held_out.values())) if isinstance(held_out, dict) else held_out
        if rows is None:
            rows = first_rows(self.train_dataset, REQUESTS)
            logger.warning(
                "calibrate: no eval_dataset; the KL is measured on prompts that were trained on"
            )
        model = self.accelerator.unwrap_model(self.model)
        reward_head = model.lm_head_module.reward_head
        found: list[Any] = [None]
        with agree_on("calibrating"), whole_heads(model):
            # A sharded model's forwards take all processes, each with the same rows and seed.
            if self.accelerator.is_main_process or is_sharded(model):
                found = [self._calibrate(rows)]
            scaled = [broadcast(p.data) for p in reward_head.parameters()]
            if is_sharded(model):
                scaled = [value.clone() for value in scaled]
        if is_sharded(model):
            for parameter, value in zip(reward_head.parameters(), scaled, strict=True):
                copy_whole(parameter, value)
        curve = broadcast_object_list(found)[0]
        model.dual_head_config.kl_curve = curve
        return curve

    @torch.no_grad()
    def _calibrate(self, rows: Any) -> list[list[float]]:
        model = self.accelerator.unwrap_model(self.model)
        prompts: dict[tuple[int, ...], None] = {}
        hidden: list[Tensor] = []
        gate_logit: list[Tensor] = []
        for index in range(min(len(rows), REQUESTS)):
            for ids, mask in texts_of(rows[index]):
                first = next((i for i, of_response in enumerate(mask) if of_response), 0)
                if first:
                    prompts[tuple(ids[:first])] = None
            if len(hidden) * 32 < CALIBRATION_STATES:
                batch = torch.tensor([ids], device=model.device)
                states = model.training_hidden_states(
                    input_ids=batch, attention_mask=torch.ones_like(batch)
                )
                of_response = torch.tensor(mask[1:], device=model.device).bool()
                gate_logit.append(model.lm_head_module.gate(states)[0, :-1][of_response])
                hidden.append(states[0, :-1][of_response])
        return calibrate(
            model, torch.cat(hidden), torch.cat(gate_logit), list(prompts), seed=self.args.seed
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with ``gate_learning_rate`` for the gate."""
        made, rate = self.optimizer is None, self.args.gate_learning_rate
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and rate is not None:
            self._split_off_gate(optimizer, rate)
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _split_off_gate(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        gate = set(self.accelerator.unwrap_model(self.model).lm_head_module.gate.parameters())
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if p in gate]
            group["params"] = [p for p in group["params"] if p not in gate]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]

    # --- the objective ---

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, and the counts (4,) that their losses are
        divided by, summed over all micro-batches and processes (`loss.terms.LossCounts`).
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        total = None
        for batch in batches:
            packed, mask = packed_rows(batch.get("position_ids")), batch["completion_mask"]
            if packed is not None:
                mask = packed.unpack(mask) * packed.valid
            # Position t predicts token t + 1: the first token's mask is never used.
            lengths, pairs = mask[:, 1:].bool().sum(-1), batch.get("pairs")
            pairing = Pairing(len(lengths), None if pairs is None else pairs.tolist())
            counts = LossCounts.of_lengths(lengths, pairing, self.args.lm_on_chosen)
            total = counts if total is None else total + counts
        numbers = (total.sequences, total.lm_tokens, total.pairs, total.tokens)
        sums = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in numbers]
        return batches, self.accelerator.reduce(torch.stack(sums), "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch [all chosen; all rejected], computed inside the (wrapped)
        model's forward. num_items_in_batch: from :meth:`get_batch_samples`.
        """
        training = model.training
        plain = self.accelerator.unwrap_model(model)
        if training:  # the backbone is frozen: no dropout
            plain.eval()
        if is_sharded(plain):  # the heads stay whole from a loss to its gradients
            plain.set_reshard_after_forward(not training, recurse=False)
        options = self.args.loss_arguments()
        if num_items_in_batch is not None:
            counts = cast(Tensor, num_items_in_batch)  # ours: see get_batch_samples
            options["counts"] = LossCounts(*counts.unbind())
        output = model(**inputs, loss_options=options)
        loss = output.loss
        if training:
            totals = output.totals.sum(0)
            kept = self._train_totals
            self._train_totals = totals if kept is None else kept + totals
            if num_items_in_batch is not None:
                # Counts include all processes, but DDP averages gradients over processes.
                loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        """(loss, the totals of each pair, None)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), output.totals, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in transformers, with metrics over all pairs, each counted once."""
        evaluate: Any = super().evaluation_loop
        output = evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        parts = output.predictions if isinstance(output.predictions, list) else [output.predictions]
        rows = [torch.as_tensor(part) for part in parts]
        metrics = metrics_of_totals(torch.cat(rows).sum(0), self.args.loss_options)
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all examples since the last log to a training log."""
        if "loss" in logs and self._train_totals is not None:
            totals = self.accelerator.reduce(self._train_totals, "sum")
            self._train_totals = None
            logs |= metrics_of_totals(totals, self.args.loss_options)
            if self.args.log_kl and "kl" not in logs:
                model = self.accelerator.unwrap_model(self.model)
                if self.is_world_process_zero() or is_sharded(model):
                    logs["kl"] = self._log_probe()[0]
            self._warn_of_collapse(logs)
        super().log(logs, start_time)

    def probe(self, count: int = STATES) -> GateProbe:
        """A function that measures the mixture's distance from the backbone, on ``count`` hidden
        states of eval_dataset, or of train_dataset if there is none.
        """
        held_out = self.eval_dataset
        rows = next(iter(held_out.values())) if isinstance(held_out, dict) else held_out
        model = self.accelerator.unwrap_model(self.model)
        rows = first_rows(self.train_dataset, ROWS) if rows is None else rows
        return GateProbe(model, rows, count)

    @cached_property
    def _log_probe(self) -> GateProbe:
        return self.probe()

    def _warn_of_collapse(self, logs: dict[str, float]) -> None:
        saturated = logs.get("gate/saturation", 0.0)
        model: Any = self.model
        fixed = model.dual_head_config.gate == "fixed"
        if saturated > COLLAPSED_SHARE and not fixed and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                "The gate has collapsed: alpha is below 0.01 for %.0f %% of the tokens and above "
                "0.99 for %.0f %%; the logs hold its histogram. Smaller steps, "
                "reward_l2=0, lm_reduction='mean', pref_on='mixed' or a larger lambda_g may help.",
                100 * logs["gate/below_0.01"],
                100 * logs["gate/above_0.99"],
            )


def _check_objective(model: DualHeadForCausalLM, args: DualHeadTrainingArguments) -> None:
    """Check that the objective fits the model, and record it in the model's config."""
    config = model.dual_head_config
    if args.preset == "paper" and config.reward_head != "full":
        raise ValueError(
            'DualHeadTrainer: preset="paper" trains a full reward head; make the model with '
            f'reward_head="full", got {config.reward_head!r}'
        )
    if config.gate != "fixed" and not args.loss_options.teaches_gate(args.lm_on_chosen):
        raise ValueError(f"DualHeadTrainer: {UNTAUGHT_GATE}")
    weights = args.objective_weights
    if weights is not None and len(weights) != config.num_objectives:
        raise ValueError(
            "DualHeadTrainer: objective_weights must hold one number per reward head, "
            f"{config.num_objectives}, got {len(weights)}"
        )
    config.preference = args.preference


def _pad_token_id(tokenizer: Any) -> int:
    """The padding token; it is masked everywhere, so any token would do."""
    if tokenizer is None:
        return 0
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
