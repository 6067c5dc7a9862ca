# SPDX-License-Identifier: Apache-2.0
"""Steps that train models: backbones and everything trained on pairs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...data import embedded_backbone_path
from .cells import Cell, Store
from .pretraining import pretrain_backbone
from .scales import EMBEDDED
from .settings import BackboneSpec, TrainSettings
from .trained import read_record, weights_digest
from .training import TRAINERS


def pretrain(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: spec (or "embedded"), corpora, seed, compiled. Returns the recipe's figures."""
    options = cell.options
    if options["spec"] == EMBEDDED:
        shutil.copytree(embedded_backbone_path(), folder)
    else:
        spec, dialogues = BackboneSpec(**options["spec"]), store.data.dialogues(options["corpora"])
        tokenizer, seed = embedded_backbone_path(), options["seed"]
        pretrain_backbone(spec, dialogues, tokenizer, folder, seed, compiled=options["compiled"])
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    kept = ("validation_loss_nats_per_token", "validation_bits_per_byte", "parameters", "steps")
    return {name: recipe[name] for name in kept} | {"weights": weights_digest(folder)}


def train(cell: Cell, store: Store, folder: Path | None) -> dict[str, Any]:
    """options: method, settings, half, count, subset, extra (the method's own), digest; needs
    backbone and, for RLOO, reward_model. -> figures of the record, and the last mean loss.
    """
    options, extra = cell.options, dict(cell.options["extra"])
    pairs = store.data.training_pairs(options["half"], options["count"], options["subset"])
    if not options["objectives"]:
        pairs = [row | {"objective": 0} for row in pairs]
    if "reward_model" in cell.needs:
        extra["reward_model"] = store.folder(cell.needs["reward_model"])
    backbone = store.folder(cell.needs["backbone"])
    settings = TrainSettings(**options["settings"])
    TRAINERS[options["method"]](backbone, pairs, folder, settings, **extra)
    record = read_record(folder)
    losses = [entry["loss"] for entry in record["logs"] if "loss" in entry]
    kept = ("pairs", "steps", "trained_parameters", "parameters")
    return {name: record[name] for name in kept} | {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "weights": weights_digest(folder),
    }
