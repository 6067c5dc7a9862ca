# SPDX-License-Identifier: Apache-2.0
"""The cells of the paper's suite, in the order of computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .cells import Cell
from .data import SUBSETS, TEST, Data
from .scales import Scale
from .systems import BENCHMARKED, GATED, HEADLINE, SEARCHES, SYSTEMS, TIMED, Builder, Recipe, genarm

MAIN, WEAK, OTHER = "main", "weak", "other"


@dataclass(frozen=True)
class Measured:
    """A system's cells: generated texts, their statistics, judge scores, and likelihoods of given
    texts (None for a search).
    """

    recipe: Recipe
    decode: Cell
    texts: Cell
    reward: Cell
    likelihood: Cell | None

    @property
    def cells(self) -> list[Cell]:
        found = [self.likelihood, self.decode, self.texts, self.reward]
        return [cell for cell in found if cell is not None]


@dataclass
class Plan:
    """Cells by what the tables ask for. ``systems``, ``over_backbone`` (win rate of the system over
    the backbone) and ``under_dual_head`` (win rate of Dual-Head over the system) are by (backbone,
    name, seed); ``front`` is by (method, weight) and holds the scores of the helpful and of the
    harmless judge; ``questions`` is name -> (MT-Bench reward, win rate over the backbone).
    """

    scale: Scale
    seeds: int
    systems: dict[tuple[str, str, int], Measured] = field(default_factory=dict)
    over_backbone: dict[tuple[str, str, int], Cell] = field(default_factory=dict)
    under_dual_head: dict[tuple[str, str, int], Cell] = field(default_factory=dict)
    judges: dict[str, Cell] = field(default_factory=dict)
    gates: dict[str, Cell] = field(default_factory=dict)
    sweep: dict[float, Measured] = field(default_factory=dict)
    front: dict[tuple[str, float], tuple[Cell, Cell]] = field(default_factory=dict)
    truthfulqa: dict[str, Cell] = field(default_factory=dict)
    mt_bench: dict[str, tuple[Cell, Cell | None]] = field(default_factory=dict)
    cost: Cell | None = None
    without: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """All cells, without those that are only needed by others."""
        found = list(self.judges.values())
        for place, measured in self.systems.items():
            found += measured.cells
            compared = (self.over_backbone.get(place), self.under_dual_head.get(place))
            found += [cell for cell in compared if cell is not None]
        for measured in self.sweep.values():
            found += measured.cells
        found += [cell for pair in self.front.values() for cell in pair]
        found += [*self.gates.values(), *self.truthfulqa.values()]
        found += [cell for pair in self.mt_bench.values() for cell in pair if cell is not None]
        return found + ([self.cost] if self.cost else [])


class Planner:
    """Makes a :class:`Plan`.

    Args:
        scale, data: how large, and what on.
        seeds: seeds of the headline systems.
        names: systems to compare; default all.
        judge_url, judge_model: an endpoint for win rates in place of the reward model.
    """

    def __init__(
        self,
        scale: Scale,
        data: Data,
        seeds: int | None = None,
        names: Sequence[str] | None = None,
        judge_url: str | None = None,
        judge_model: str | None = None,
    ) -> None:
        self._scale, self._data = scale, data
        self._names = tuple(SYSTEMS if names is None else names)
        self._dtype = scale.dtype
        self._endpoint = {"url": judge_url, "model": judge_model} if judge_url else {}
        without = tuple(name for name in SYSTEMS if name not in self._names)
        self.plan = Plan(scale, seeds or scale.seeds, without=without)

    def __call__(self) -> Plan:
        plan = self.plan
        main = Builder(self._scale, self._data)
        self._judge = main.reward_model("judge")
        self._judges(main)
        for seed in range(plan.seeds):
            self._systems(MAIN, seed, self._names if seed == 0 else HEADLINE)
            self._systems(OTHER, seed, HEADLINE)
        for name in self._chosen(GATED):
            plan.gates[name] = self._gate(plan.systems[MAIN, name, 0].recipe, name)
        if "fixed_gate" in self._names:
            for alpha in self._scale.alphas:
                plan.sweep[alpha] = self._fixed(main, alpha)
        self._front(main)
        self._benchmarks()
        plan.cost = self._cost()
        return plan

    def _chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._names]

    # --- systems ----------------------------------------------------------------------------------

    def _systems(self, backbone: str, seed: int, names: Sequence[str]) -> None:
        plan = self.plan
        builder = Builder(self._scale, self._data, seed, backbone)
        for name in self._chosen(names):
            label = f"{SYSTEMS[name].label} on {backbone}, seed {seed}"
            recipe = SYSTEMS[name].build(builder)
            plan.systems[backbone, name, seed] = self._measured(
                recipe, label, seed, name not in SEARCHES
            )
        for name in self._chosen(names):
            place = (backbone, name, seed)
            for other, wins in (
                ("backbone", plan.over_backbone),
                ("dual_head", plan.under_dual_head),
            ):
                rival = plan.systems.get((backbone, other, seed))
                if rival is not None and name != other:
                    pair = (plan.systems[place], rival)
                    a, b = pair if other == "backbone" else pair[::-1]
                    wins[place] = self._compare(a, b, f"{name} and {other}")

    def _measured(self, recipe: Recipe, label: str, seed: int, likely: bool = True) -> Measured:
        decode = self._decode(recipe, label, seed)
        home = Builder(self._scale, self._data).backbone()  # one embedder for all
        return Measured(
            recipe,
            decode,
            Cell("texts", f"texts of {label}", {}, {"texts": decode, "backbone": home}),
            self._reward(decode, self._judge, label),
            self._likelihood(recipe, label) if likely else None,
        )

    def _of(self, recipe: Recipe) -> dict[str, Any]:
        return {"decoder": recipe.decoder, "decoder_options": dict(recipe.options)}

    def _decode(self, recipe: Recipe, label: str, seed: int, questions: str = "hh") -> Cell:
        scale = self._scale
        options = self._of(recipe) | {
            "dtype": self._dtype,
            "questions": questions,
            "count": scale.prompts if questions == "hh" else scale.mt_bench,
            "prompt_tokens": scale.prompt_tokens,
            "new_tokens": scale.new_tokens,
            "batch": scale.batch,
            "temperature": scale.temperature,
            "seed": seed,
            "digest": self._data.digest(TEST if questions == "hh" else "mt_bench_questions.jsonl"),
        }
        return Cell("decode", f"{questions} answers of {label}", options, recipe.roles)

    def _reward(self, decode: Cell, judge: Cell, label: str) -> Cell:
        needs = {"texts": decode, "judge": judge, "judge_backbone": judge.needs["backbone"]}
        options = {"max_length": self._scale.training["max_length"]}
        return Cell("reward", f"reward of {label}", options, needs)

    def _on_pairs(self) -> dict[str, Any]:
        scale = self._scale
        return {
            "count": scale.test_pairs,
            "max_length": scale.training["max_length"],
            "digest": self._data.digest(TEST),
        }

    def _likelihood(self, recipe: Recipe, label: str) -> Cell:
        options = self._of(recipe) | self._on_pairs()
        return Cell("likelihood", f"likelihood of {label}", options, recipe.roles)

    def _compare(self, a: Measured, b: Measured, label: str) -> Cell:
        needs = {"a": a.decode, "b": b.decode}
        if not self._endpoint:
            needs |= {"reward_a": a.reward, "reward_b": b.reward}
        return Cell("compare", f"{label} compared", self._endpoint, needs)

    def _gate(self, recipe: Recipe, name: str) -> Cell:
        options = self._of(recipe) | self._on_pairs() | {"positions": 64, "traces": 3}
        return Cell("gate", f"gate of {name}", options, recipe.roles)

    def _fixed(self, builder: Builder, alpha: float) -> Measured:
        roles = builder.roles(builder.dual_head("fixed_gate"))
        recipe = Recipe("plain", roles, {"alpha": alpha})
        return self._measured(recipe, f"a fixed gate at {alpha}", 0)

    # --- the rest ---------------------------------------------------------------------------------

    def _judges(self, builder: Builder) -> None:
        """The accuracy of the reward models that judge and of those that guide ARGS."""
        if "args_weak" in self._names:
            models = {
                "guide, main": builder.reward_model(),
                "guide, weak": builder.reward_model(backbone=WEAK),
            }
        else:
            models = {}
        models["judge"] = self._judge
        for name, model in models.items():
            needs = {"judge": model, "judge_backbone": model.needs["backbone"]}
            options = self._on_pairs() | {"subsets": list(SUBSETS)}
            cell = Cell("judge_accuracy", f"accuracy of reward model {name}", options, needs)
            self.plan.judges[name] = cell

    def _front(self, builder: Builder) -> None:
        """Two objectives over a grid of weights, each text scored by both judges."""
        judges = [builder.reward_model("judge", subset=subset) for subset in SUBSETS]
        recipes = {}
        if "dual_head" in self._names:
            two = builder.roles(builder.dual_head(objectives=True, num_objectives=2))
            recipes["dual_head"] = lambda w: Recipe(
                "plain", two, {"objective_weights": [w, 1.0 - w]}
            )
        if "genarm_lora" in self._names:
            guides = [builder.genarm(True, subset=subset) for subset in SUBSETS]
            roles = builder.roles(None, *guides)
            recipes["genarm_lora"] = lambda w: genarm(roles, [w, 1.0 - w])
        for name, recipe in recipes.items():
            for weight in self._scale.weights:
                label = f"{name}, weights {weight:g} and {1 - weight:g}"
                decode = self._decode(recipe(weight), label, 0)
                helpful, harmless = (self._reward(decode, judge, label) for judge in judges)
                self.plan.front[name, weight] = (helpful, harmless)

    def _benchmarks(self) -> None:
        plan, written = self.plan, {}
        for name in self._chosen(BENCHMARKED):
            recipe = plan.systems[MAIN, name, 0].recipe
            options = self._of(recipe) | {
                "count": self._scale.truthfulqa,
                "max_length": self._scale.training["max_length"],
                "digest": self._data.digest("truthfulqa.csv"),
            }
            plan.truthfulqa[name] = Cell("answers", f"TruthfulQA of {name}", options, recipe.roles)
            decode = self._decode(recipe, name, 0, "mt_bench")
            reward = self._reward(decode, self._judge, f"{name} on MT-Bench")
            written[name] = Measured(recipe, decode, decode, reward, None)
        for name, measured in written.items():
            rival = written.get("backbone") if name != "backbone" else None
            compare = rival and self._compare(measured, rival, f"{name} and backbone on MT-Bench")
            plan.mt_bench[name] = (measured.reward, compare)

    def _cost(self) -> Cell:
        """One cell, since all are timed in turns."""
        systems, needs = {}, {}
        for name in self._chosen(TIMED):
            recipe = self.plan.systems[MAIN, name, 0].recipe
            systems[name] = self._of(recipe)
            needs |= {f"{name}/{role}": cell for role, cell in recipe.roles.items()}
        options = {"systems": systems, "dtype": self._dtype, **self._scale.cost}
        return Cell("cost", "cost of decoding", options, needs)


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless all are names of SYSTEMS, each once, the backbone among them."""
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"systems must be some of {', '.join(SYSTEMS)}, each once, got {names}")
    if "backbone" not in names:
        raise ValueError("systems must have the backbone among them, which all are compared with")
