# SPDX-License-Identifier: Apache-2.0
"""The cells of the steering suite, the most important first, because a run may be interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...train.presets import PRESETS
from ..paper.cells import Cell
from .attributes import ATTRIBUTES, PROVOKING

KL_TARGETS = (0.1, 0.05, 0.2, 0.4)
SEEDS = 3
# Number of sampled responses to a training prompt.
TRAIN_SAMPLES = 6
FRONT = ("sentiment", "readability")
FRONT_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
RANKED = "sentiment"
RANKS = (0, 1, 4, 16, 64, 256)


@dataclass(frozen=True, eq=False)
class System:
    """A system that is compared.

    Attributes:
        name: name in the results.
        method: training method, a name of `training.METHODS`, or None.
        reward_head, gate: kinds of a gated head's parts, otherwise None.
        options: options of the training.
        best_of: number of samples that it chooses from, otherwise 0.
        strength: a fixed strength, if none reaches the targets; otherwise it is set by the KL.
    """

    name: str
    method: str | None = None
    reward_head: str | None = None
    gate: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    best_of: int = 0
    strength: float | None = None

    @property
    def parts(self) -> dict[str, str | None]:
        return {"system": self.name, "reward_head": self.reward_head, "gate": self.gate}

    @property
    def label(self) -> str:
        """The parts in a few words; a rank other than the default is one of them."""
        rank = self.options.get("reward_rank")
        named = None if rank is None else f"rank {rank}"
        return " ".join(filter(None, (self.name, self.reward_head, named, self.gate)))


def _dual_head(reward_head: str, gate: str) -> System:
    options: dict[str, Any] = {"reward_head": reward_head, "gate": gate}
    if gate != "fixed":
        # At the reward head's learning rate the gate closes; this one ranks held-out pairs best.
        # With a weight on squared rewards it would open on every token.
        options |= {"gate_learning_rate": 1e-3, "reward_l2": 0.0}
    return System("dual-head", "dual_head", reward_head, gate, options)


def _of_rank(rank: int) -> System:
    """An embedding head with a fixed gate. Rank 0 is the default head."""
    system = _dual_head("embedding", "fixed")
    return replace(system, options={**system.options, "reward_rank": rank}) if rank else system


BACKBONE = System("backbone")
GATES = ("fixed", "linear", "attention")
DUAL_HEADS = {
    (head, gate): _dual_head(head, gate)
    for head in ("embedding", "lowrank", "full")
    for gate in GATES
}
FRONT_SYSTEM = DUAL_HEADS["embedding", "fixed"]
# Reward heads by size: the number of trained parameters grows from d to V d.
SIZED = {
    **{f"embedding, rank {rank}": _of_rank(rank) for rank in RANKS},
    "lowrank": DUAL_HEADS["lowrank", "fixed"],
    "full": DUAL_HEADS["full", "fixed"],
}
PAPER = System("paper", "dual_head", "full", "attention", {"preset": "paper"})
BEST_OF = tuple(System(f"best-of-{n}", best_of=n) for n in (4, 16))
GENARM = System("genarm", "autoregressive_reward")
DPO = System("dpo", "dpo")
# Its candidates alone are already far from the backbone, so its weight is the paper's.
ARGS = System("args", "reward_model", strength=1.0)
NAMES = ("backbone", "dual-head", "paper", "genarm", "dpo", "args", "best-of-4", "best-of-16")
# The comparison of reward heads by size alone.
BY_SIZE = "dual-head-by-size"
# Some of the gated heads alone.
VARIANTS = (*(f"dual-head-{head}-{gate}" for head, gate in DUAL_HEADS), BY_SIZE)


@dataclass(frozen=True)
class Size:
    """How much is computed. The defaults are those of the published results.

    Attributes:
        training: training options of gated heads, in addition to the recipe.
        adapter: training options of the other systems, in addition to `training.ADAPTER`.
    """

    backbone: str = "smollm2"
    train_prompts: int = 128
    calibration_prompts: int = 24
    prompts: int = 208
    new_tokens: int = 40
    batch_size: int = 52
    max_length: int = 160
    training: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)


# Another scale is for tests of the machinery.
SIZES = {
    "standard": Size(),
    "tiny": Size(
        backbone="embedded",
        train_prompts=8,
        calibration_prompts=4,
        prompts=8,
        new_tokens=8,
        batch_size=4,
        max_length=96,
        training={"num_train_epochs": 1.0},
        # A single step would be warm-up, with a learning rate of 0.
        adapter={"learning_rate": 1e-2, "max_steps": 4, "batch_size": 8},
    ),
}


@dataclass
class Plan:
    """The cells, indexed for the report.

    Attributes:
        decoded: (system, attribute, target, seed) -> the cell with the texts; target is None for
            systems without one.
        costs: system -> the cell with its timing.
        training: the cell that times the training of the default head, if that head is wanted.
        front: (weight, seed) -> the cell decoded with it.
        sizes: (name in `SIZED`, seed) -> the cell decoded with that head, at the first target.
    """

    size: Size
    decoded: dict[tuple[System, str, float | None, int], Cell] = field(default_factory=dict)
    costs: dict[tuple[str | None, ...], Cell] = field(default_factory=dict)
    training: Cell | None = None
    front: dict[tuple[float, int], Cell] = field(default_factory=dict)
    sizes: dict[tuple[str, int], Cell] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        timed = [*self.costs.values(), *([self.training] if self.training else [])]
        cells = [*self.decoded.values(), *self.front.values(), *self.sizes.values(), *timed]
        return list({cell.key: cell for cell in cells}.values())  # some sizes are decoded anyway


class Planner:
    """Makes a :class:`Plan`; call it once.

    Args:
        size: how much is computed.
        attributes: names from `ATTRIBUTES`.
        seeds: seeds of training and decoding.
        targets: KL targets in nats per token.
        systems: names from `NAMES` and `VARIANTS`.
    """

    def __init__(
        self,
        size: Size,
        attributes: Sequence[str],
        seeds: int = SEEDS,
        targets: Sequence[float] = KL_TARGETS,
        systems: Sequence[str] = NAMES,
    ) -> None:
        self._size, self._attributes, self._systems = size, attributes, systems
        self._seeds, self._targets = range(seeds), targets
        self._plan = Plan(size)

    def __call__(self) -> Plan:
        for attribute, system, target in self._order():
            if not self._wanted(system):
                continue
            for seed in self._seeds:
                place = (system, attribute, target, seed)
                self._plan.decoded[place] = self._decode(*place)
        if set(FRONT) <= set(self._attributes) and self._wanted(FRONT_SYSTEM):
            self._plan.front = {
                (weight, seed): self._front(weight, seed)
                for seed in self._seeds
                for weight in FRONT_WEIGHTS
            }
        if RANKED in self._attributes and self._targets and self._wants_sizes():
            self._plan.sizes = {
                (name, seed): self._decode(system, RANKED, self._targets[0], seed)
                for name, system in SIZED.items()
                for seed in self._seeds
            }
        for system in (BACKBONE, *DUAL_HEADS.values(), GENARM):
            if self._wanted(system):
                self._plan.costs[tuple(system.parts.values())] = self._cost(system)
        if self._wanted(FRONT_SYSTEM):
            trained = self._train(FRONT_SYSTEM, ("sentiment",), 0)
            label = f"time of training, {trained.label}"
            self._plan.training = Cell("training_time", label, trained.options, trained.needs)
        return self._plan

    def _wanted(self, system: System) -> bool:
        variant = "-".join(filter(None, system.parts.values()))
        return system.name in self._systems or variant in self._systems

    def _wants_sizes(self) -> bool:
        return not {FRONT_SYSTEM.name, BY_SIZE}.isdisjoint(self._systems)

    def _order(self) -> Iterator[tuple[str, System, float | None]]:
        """(attribute, system, target), the most important first."""
        first = [self._targets[0]] if self._targets else []
        main = [DUAL_HEADS["embedding", gate] for gate in GATES]
        heads = [system for system in DUAL_HEADS.values() if system not in main]
        rest = [name for name in self._attributes if name != "sentiment"]
        if "sentiment" in self._attributes:
            for targets, systems in (
                (first, main),
                (first, [PAPER]),
                ((None,), [BACKBONE, BEST_OF[0]]),
                (self._targets[1:], main),
                (first, [DPO, GENARM]),
                (first, heads),
                (self._targets[1:], [PAPER, DPO, GENARM]),
            ):
                yield from (("sentiment", s, t) for t in targets for s in systems)
        for name in rest:
            yield from ((name, s, None) for s in (BACKBONE, BEST_OF[0]))
            yield from ((name, s, t) for t in first for s in (main[0], PAPER, DPO, GENARM))
        if "sentiment" in self._attributes:
            yield from (("sentiment", s, None) for s in (BEST_OF[1], ARGS))
            yield from (("sentiment", s, t) for t in self._targets[1:] for s in heads)
        for name in rest:
            systems = (main[0], PAPER, DPO, GENARM)
            yield from ((name, s, t) for t in self._targets[1:] for s in systems)

    # --- cells ---

    def _samples(self, attribute: str, split: str, seed: int, numbers: tuple[int, int]) -> Cell:
        """Responses of the backbone, shared by all attributes with the same prompts."""
        size, kind = self._size, ATTRIBUTES[attribute].prompts
        counts = {"train": size.train_prompts, "calibration": size.calibration_prompts}
        options = {
            "backbone": size.backbone,
            "prompts": kind,
            "split": split,
            "count": counts.get(split, size.prompts),
            "numbers": list(numbers),
            "seed": seed,
            "new_tokens": size.new_tokens,
        }
        low, high = numbers
        label = f"{split} samples {low + 1} to {high}, seed {seed}"
        if kind == PROVOKING:
            label += ", provoking prompts"
        return Cell("samples", label, options)

    @staticmethod
    def _recipe(system: System) -> dict[str, Any] | None:
        """The values of a gated head's preset, so that changing the preset changes the cell."""
        if system.method != "dual_head":
            return None
        return PRESETS[system.options.get("preset", "default")]

    def _train(self, system: System, attributes: tuple[str, ...], seed: int) -> Cell:
        size = self._size
        needs = {"samples": self._samples(attributes[0], "train", 0, (0, TRAIN_SAMPLES))}
        if system.method == "dual_head":
            needs["held_out"] = self._samples(attributes[0], "calibration", 0, (0, TRAIN_SAMPLES))
        options = {
            "backbone": size.backbone,
            "method": system.method,
            "attributes": list(attributes),
            "options": system.options,
            "recipe": self._recipe(system),
            "training": size.training if system.method == "dual_head" else size.adapter,
            "max_length": size.max_length,
            "seed": seed,
        }
        label = f"{system.label}, {'+'.join(attributes)}, seed {seed}"
        return Cell("train", label, options, needs)

    def _decode(self, system: System, attribute: str, target: float | None, seed: int) -> Cell:
        size, needs = self._size, {}
        if system.method is not None:
            needs["model"] = self._train(system, (attribute,), seed)
        if system.best_of:
            needs["samples"] = self._samples(attribute, "measure", seed, (0, 4))
            if system.best_of > 4:
                needs["more"] = self._samples(attribute, "measure", seed, (4, system.best_of))
        options = {
            "backbone": size.backbone,
            "system": system.name,
            "method": system.method,
            "attribute": attribute,
            "kl_target": target,
            "strength": system.strength,
            "best_of": system.best_of,
            "prompts": size.prompts,
            "new_tokens": size.new_tokens,
            "batch_size": size.batch_size,
            "weights": None,
            "seed": seed,
        }
        at = "" if target is None else f", KL {target:g}"
        return Cell("decode", f"{system.label}, {attribute}{at}, seed {seed}", options, needs)

    def _front(self, weight: float, seed: int) -> Cell:
        system = FRONT_SYSTEM
        cell = self._decode(system, FRONT[0], self._targets[0], seed)
        options = {**cell.options, "weights": [weight, 1.0 - weight]}
        needs = {"model": self._train(system, FRONT, seed)}
        label = f"{'+'.join(FRONT)}, weight {weight:g}, seed {seed}"
        return Cell("decode", label, options, needs)

    def _cost(self, system: System) -> Cell:
        needs = {}
        if system.method is not None:
            needs["model"] = self._train(system, ("sentiment",), 0)
        options = {
            "backbone": self._size.backbone,
            "method": system.method,
            "new_tokens": self._size.new_tokens,
        }
        return Cell("cost", f"time of {system.label}", options, needs)
