# SPDX-License-Identifier: Apache-2.0
"""A Trainer with crash-safe checkpoints of the heads only, which resume bitwise identically.

transformers writes checkpoints in place and resumes from the highest number; here they use
:mod:`dualhead_ext.files.checkpoint`. The methods overridden are the same from release 5.17 to 5.23.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..files import checkpoint
from ..files.atomic import locked
from ..files.checkpoint import CheckpointError, LostProcessError, SaveError
from ..files.state_file import load_state, save_state
from ..model.backbones import module_name
from ..model.fingerprint import check_fingerprint
from ..model.head_files import load_head_state
from ..model.head_folder import CONFIG_NAME, WEIGHTS_NAME, read_head_folder
from ..model.shards import is_sharded, own_share, whole_state
from .arguments import DualHeadTrainingArguments
from .state import (
    agree_on,
    check_data_state,
    data_state,
    is_lost_process,
    random_state,
    set_random_state,
)

STATE_NAME = "trainer_state.json"  # transformers' own file
OPTIMIZER_NAME = "optimizer.safetensors"  # optimizer, scheduler, gradient scaler
PROGRESS_NAME = "progress.safetensors"  # per process: random numbers, unlogged totals; the data
ARGUMENTS_NAME = "training_args.json"
LOCK_NAME = ".lock"  # in the output folder, while a run writes to it


class CheckpointedTrainer(Trainer):
    """Saving and resuming of :class:`dualhead_ext.DualHeadTrainer`."""

    args: DualHeadTrainingArguments
    _train_totals: Tensor | None = None  # of this process, since the last log
    _saving_tried = False
    _holds_output = False
    _parameters: list[list[nn.Parameter]]  # of the optimizer's groups

    # --- saving ---

    @contextlib.contextmanager
    def holding_output(self) -> Iterator[None]:
        """Keep other runs out of ``args.output_dir``. ``train`` and ``try_saving`` do it for as
        long as they last; hold it around them for what comes in between and after. Collective.

        Raises:
            BusyFolderError: another run is writing to the folder. SaveError: it cannot be written.
        """
        if self._holds_output:
            yield
            return
        with contextlib.ExitStack() as held:
            with agree_on("taking the output folder"):
                if self.args.should_save:
                    held.enter_context(_lock_of(Path(self.args.output_dir)))
            self._holds_output = True
            try:
                yield
            finally:
                self._holds_output = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write heads, tokenizer and arguments; called by save_model on writing processes."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        (folder / ARGUMENTS_NAME).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write heads, tokenizer and arguments, into ``args.output_dir`` by default.

        Raises:
            SaveError: saving failed; the message says why, and which checkpoint is complete.
        """
        with _saying_what_is_safe("the heads", Path(self.args.output_dir)):
            if (heads := self._whole_heads()) is None:
                super().save_model(output_dir, _internal_call)
            else:
                self._save(output_dir, heads)

    def try_saving(self) -> None:
        """Write a checkpoint without optimizer to a hidden folder and remove it, so that errors of
        saving show before training. ``train`` does this once, unless ``save_strategy="no"``.

        Raises:
            SaveError: saving failed; the message says why.
            BusyFolderError: another run is writing to ``args.output_dir``.
        """
        with self.holding_output():
            self._try_saving()

    def _try_saving(self) -> None:
        self._saving_tried = True
        run_dir, own = Path(self.args.output_dir), {"random": random_state(self.args.device)}
        heads = self._whole_heads()
        with agree_on("a trial save"):
            if not self.args.should_save:
                return
            staging = None
            try:
                staging = checkpoint.begin(run_dir, 0)
                self._save(str(staging), heads)
                if self.train_dataset is not None:
                    data = data_state(self.train_dataset, self.args)
                    save_state(staging / PROGRESS_NAME, {"processes": [own], "data": data})
            except Exception as error:
                raise SaveError(
                    f"DualHeadTrainer: a trial save in {run_dir} failed ({error}); nothing has "
                    "been trained, and what was there is as it was"
                ) from error
            finally:
                if staging is not None:
                    checkpoint.discard(staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint atomically, then delete the oldest ones."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        best = self.state.best_global_step
        if best and (best == step or (run_dir / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")
        own = {"random": random_state(self.args.device), "totals": self._train_totals}
        progress, heads = gather_object([own]), self._whole_heads()
        optimizer = whole_state(self.optimizer.state_dict(), self.args.should_save)
        with agree_on(f"saving checkpoint-{step}"):
            if self.args.should_save:
                with _saying_what_is_safe(f"checkpoint-{step}", run_dir):
                    with checkpoint.staged(run_dir, step, self._required()) as folder:
                        self._write_checkpoint(folder, progress, heads, optimizer)
                    if self.args.save_total_limit:
                        kept = self.state.best_model_checkpoint
                        limit = self.args.save_total_limit
                        checkpoint.rotate(run_dir, limit, keep=(kept,) if kept else ())

    def _required(self) -> tuple[str, ...]:
        """Names of the files that a complete checkpoint of this run has."""
        names = (CONFIG_NAME, WEIGHTS_NAME, ARGUMENTS_NAME, STATE_NAME)
        return names if self.args.save_only_model else (*names, OPTIMIZER_NAME, PROGRESS_NAME)

    def _whole_heads(self) -> dict[str, Tensor] | None:
        """The whole heads' state of a sharded model under the model's names, on writing processes;
        None if the model is not sharded. Collective.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not is_sharded(model):
            return None
        head = model.lm_head_module
        state = head.state_dict(prefix=f"{module_name(model, head)}.")
        return whole_state(state, self.args.should_save)

    def _write_checkpoint(
        self,
        folder: Path,
        progress: list[dict[str, Any]],
        heads: dict[str, Tensor] | None,
        optimizer: dict[str, Any],
    ) -> None:
        self._save(str(folder), heads)
        if not self.args.save_only_model:
            scaler = self.accelerator.scaler
            state = {
                "optimizer": optimizer,
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_state(folder / OPTIMIZER_NAME, state)
            data = data_state(self.train_dataset, self.args)
            save_state(folder / PROGRESS_NAME, {"processes": progress, "data": data})
        self._export_callbacks()
        self.state.save_to_json(str(folder / STATE_NAME))

    def _export_callbacks(self) -> None:
        """Copy the callbacks' state into the trainer's, as transformers does before saving."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                states = cast(dict[str, Any], self.state.stateful_callbacks)
                if isinstance(states[name], list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()

    # --- resuming ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in transformers. ``resume_from_checkpoint=True`` uses the last complete checkpoint in
        ``args.output_dir`` and reports those that it skips; a path is verified.

        Raises:
            SaveError: a trial save before the first step, or a checkpoint, failed.
            ValueError: no whole checkpoint; it holds no state to resume from; other data, order,
                optimizer or rows per step than it was written with.
            CheckpointError: the checkpoint is damaged.
            BusyFolderError: another run is writing to ``args.output_dir``.
            LostProcessError: another process of the run has ended.
        """
        self._train_totals = None
        with self._saying_who_is_lost(), self.holding_output():
            if resume_from_checkpoint:
                found: list[Any] = [None]
                with agree_on("resuming"):
                    if self.accelerator.is_main_process:
                        found = [self._resumable(resume_from_checkpoint)]
                resume_from_checkpoint = broadcast_object_list(found)[0]
            if self.args.save_strategy != "no" and not self._saving_tried:
                self.try_saving()
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    @contextlib.contextmanager
    def _saying_who_is_lost(self) -> Iterator[None]:
        """Convert a collective's error about a lost process into a LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            if self.args.world_size == 1 or not is_lost_process(error):
                raise
            safe = _what_is_safe(Path(self.args.output_dir))
            raise LostProcessError(
                f"DualHeadTrainer: another process of this run has ended or does not answer; {safe}"
            ) from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but a run resumed at its last step ends at once; transformers' loop
        would take one more step.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            self._prepared()
            super()._run_epoch(*args, **kwargs)

    def _resumable(self, asked: str | os.PathLike | Literal[True]) -> str:
        """The verified checkpoint to resume from, or an exception that says why there is none."""
        output_dir = self.args.output_dir
        path = checkpoint.latest_checkpoint(output_dir) if asked is True else Path(asked)
        if path is None:
            raise ValueError(f"DualHeadTrainer.train: no whole checkpoint in {output_dir}")
        names = checkpoint.verify(path)
        for name in (OPTIMIZER_NAME, PROGRESS_NAME, STATE_NAME):
            if name not in names:
                raise CheckpointError(
                    f"{path}: holds no {name} (save_only_model?): its heads can be loaded, but a "
                    "run cannot resume from it"
                )
        progress = load_state(Path(path) / PROGRESS_NAME)
        device = progress["processes"][0]["random"]["device"]
        if device != self.args.device.type:
            raise ValueError(
                f"{path}: has the random numbers of a run on {device}, this one is on "
                f"{self.args.device.type}"
            )
        if not self.args.ignore_data_skip:
            current = data_state(self.train_dataset, self.args)
            check_data_state(progress["data"], current, str(path))
        return str(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's heads into the model; configuration and backbone must be the same."""
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        stored, state = read_head_folder(resume_from_checkpoint)
        if stored["dual_head"] != model.dual_head_config:
            raise ValueError(
                f"{resume_from_checkpoint}: was written with {stored['dual_head']}, "
                f"the model has {model.dual_head_config}"
            )
        marks, version = stored["backbone"]["fingerprint"], stored["format_version"]
        check_fingerprint(model, marks, resume_from_checkpoint, version)
        load_head_state(model.lm_head_module, state, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the heads of the best checkpoint, verified."""
        best = self.state.best_model_checkpoint
        checkpoint.verify(best)
        self._load_from_checkpoint(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / OPTIMIZER_NAME)
        _check_optimizer(state["optimizer"], self.optimizer.state_dict(), checkpoint)
        self._prepared()
        self.optimizer.load_state_dict(self._own_shares(state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["scheduler"])
        scaler = self.accelerator.scaler
        if (scaler is None) != (state["scaler"] is None):
            raise ValueError(f"{checkpoint}: was written with another precision (fp16)")
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    def _own_shares(self, state: dict[str, Any]) -> dict[str, Any]:
        """This process's shards of a whole optimizer state."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        shares = {
            index: {
                name: own_share(value, parameters[index]) if isinstance(value, Tensor) else value
                for name, value in of_parameter.items()
            }
            for index, of_parameter in state["state"].items()
        }
        return state | {"state": shares}

    def _prepared(self) -> None:
        """Undo what accelerate and transformers do to a sharded model and its optimizer."""
        model = self.accelerator.unwrap_model(self.model)
        if not is_sharded(model):
            return
        # The optimizer's parameters were replaced by those that have their data's address, which
        # all empty shards share.
        for group, parameters in zip(self.optimizer.param_groups, self._parameters, strict=True):
            group["params"] = list(parameters)
        # generate() was made a forward of its own: at its end it would split the heads, in the
        # middle of whole_heads.
        vars(model).pop("generate", None)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: :meth:`_load_optimizer_and_scheduler` loads the gradient scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        processes = load_state(Path(checkpoint) / PROGRESS_NAME)["processes"]
        rank, count = self.args.process_index, len(processes)
        own = processes[rank % count]
        set_random_state(own["random"], self.args.device)
        totals = own["totals"]
        if count != self.args.world_size:  # the first process takes over what all have not logged
            found = [process["totals"] for process in processes if process["totals"] is not None]
            totals = torch.stack(found).sum(0) if found and rank == 0 else None
        self._train_totals = None if totals is None else totals.to(self.args.device)


def _check_optimizer(stored: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise ValueError unless the optimizer states are of the same kind and parameters."""

    def options(state: dict[str, Any]) -> set[str]:
        return {name for group in state["param_groups"] for name in group}

    # The schedule adds its own keys; an empty state belongs to an optimizer that has not stepped.
    differing = (options(stored) ^ options(current)) - {"initial_lr"}
    if differing:
        raise ValueError(
            f"{where}: was written with another optimizer (they differ in "
            f"{', '.join(sorted(differing))}); resume with the one it was written with"
        )
    sizes = [[len(group["params"]) for group in s["param_groups"]] for s in (stored, current)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{where}: its optimizer has groups of {sizes[0]} parameters, this run's {sizes[1]}"
        )


@contextlib.contextmanager
def _lock_of(run_dir: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(run_dir, LOCK_NAME, wait=False))
        except OSError as error:
            raise SaveError(
                f"DualHeadTrainer: {run_dir} cannot be written to ({error}); nothing has been "
                "trained"
            ) from error
        yield


def _what_is_safe(run_dir: Path) -> str:
    """A clause that names the checkpoint to resume from."""
    last = None
    with contextlib.suppress(OSError, CheckpointError):
        last = checkpoint.latest_checkpoint(run_dir)
    if last is None:
        return f"{run_dir} holds no whole checkpoint"
    return f"{last} is whole, and resume_from_checkpoint=True resumes from it"


@contextlib.contextmanager
def _saying_what_is_safe(what: str, run_dir: Path) -> Iterator[None]:
    """Convert any failure to save into a SaveError that names the checkpoint to resume from."""
    try:
        yield
    except Exception as error:
        safe = _what_is_safe(run_dir)
        raise SaveError(f"DualHeadTrainer: {what} could not be saved ({error}); {safe}") from error
