# SPDX-License-Identifier: Apache-2.0
"""The systems that are compared. One function per system defines what is trained and how it
decodes; `SYSTEMS` is the table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from .cells import Cell
from .data import TRAIN, Data
from .scales import EMBEDDED, Scale
from .settings import DUAL_HEAD_VARIANTS


@dataclass(frozen=True)
class Recipe:
    """How a system decodes, and the cells of its models.

    Attributes:
        decoder, options: a name from `running.DECODERS`, and its options.
        roles: role -> cell of a model: ``backbone``, ``policy``, ``guide0``, ...
    """

    decoder: str
    roles: Mapping[str, Cell]
    options: Mapping[str, Any] = field(default_factory=dict)


class Builder:
    """Makes the cells of models for one scale, one backbone and one seed."""

    def __init__(self, scale: Scale, data: Data, seed: int = 0, backbone: str = "main") -> None:
        self.scale, self.data, self.seed, self.name = scale, data, seed, backbone

    def backbone(self, name: str | None = None) -> Cell:
        """One of the scale's backbones; default the builder's own."""
        name = name or self.name
        spec = self.scale.backbones[name]
        if spec == EMBEDDED:
            return Cell("pretrain", f"backbone {name}", {"spec": EMBEDDED})
        corpora = {c: self.data.digest(f"{c}/dialogues.jsonl.gz") for c in self.scale.corpora}
        options = {"spec": asdict(spec), "corpora": corpora, "seed": 0}
        options["compiled"] = self.scale.compiled
        return Cell("pretrain", f"backbone {name}", options)

    def train(
        self,
        method: str,
        *,
        lora: bool = False,
        full: bool = False,
        half: str = "guide",
        subset: str | None = None,
        objectives: bool = False,
        needs: Mapping[str, Cell] | None = None,
        backbone: str | None = None,
        **extra: Any,
    ) -> Cell:
        """A cell that trains a model by ``method``, a name from `training.TRAINERS`.

        Args:
            lora, full: whether an adapter or all weights are trained; selects the learning rate.
            half, subset: which of the training pairs to use.
            objectives: keep each pair's objective; otherwise all have the same one.
            needs: cells needed in addition to the backbone.
            extra: options of the method.
        """
        scale, home = self.scale, self.backbone(backbone)
        settings = dict(scale.training) | (scale.methods.get("full", {}) if full else {})
        settings |= dict(scale.methods.get(method, {})) | {"seed": self.seed, "lora": lora}
        label = f"{method}{' (LoRA)' if lora else ''} on {home.label}, seed {self.seed}"
        options = {
            "method": method,
            "settings": settings,
            "half": half,
            "count": scale.guide_pairs if half == "guide" else scale.judge_pairs,
            "subset": subset,
            "objectives": objectives,
            "extra": extra,
            "digest": self.data.digest(TRAIN),
        }
        return Cell("train", label, options, {"backbone": home, **(needs or {})})

    def dual_head(self, variant: str = "dual_head", **others: Any) -> Cell:
        """A cell that trains a gated head. Its LM term is a mean: with so few pairs, the paper's
        sum (the variant ``lm_sum``) would dominate the preference loss.
        """
        return self.train(
            "dual_head", **{"lm_reduction": "mean"} | DUAL_HEAD_VARIANTS[variant] | others
        )

    def genarm(self, lora: bool, **others: Any) -> Cell:
        return self.train("autoregressive_reward", lora=lora, full=not lora, **others)

    def reward_model(self, half: str = "guide", **others: Any) -> Cell:
        return self.train("reward_model", full=True, half=half, **others)

    def roles(self, policy: Cell | None = None, *guides: Cell) -> dict[str, Cell]:
        """``policy`` defaults to the backbone."""
        home = self.backbone()
        found = {"backbone": home, "policy": policy or home}
        return found | {f"guide{i}": guide for i, guide in enumerate(guides)}


def _backbone(b: Builder) -> Recipe:
    return Recipe("plain", b.roles())


def _dual_head(b: Builder, variant: str) -> Recipe:
    return Recipe("plain", b.roles(b.dual_head(variant)))


def _merged(b: Builder) -> Recipe:
    return Recipe("merged", b.roles(b.dual_head("fixed_gate")))


def genarm(roles: Mapping[str, Cell], strengths: Sequence[float]) -> Recipe:
    """GenARM's decoding, at the temperature for which its exponents sum to 1 as in every other
    system. Otherwise a product of two models would be a sharper distribution.
    """
    options = {"strengths": list(strengths), "temperature": 1.0 + sum(strengths)}
    return Recipe("genarm", roles, options)


def _genarm(b: Builder, lora: bool) -> Recipe:
    return genarm(b.roles(None, b.genarm(lora)), [1.0])


def _args(b: Builder, weight: float, greedy: bool = True, backbone: str | None = None) -> Recipe:
    roles = b.roles(None, b.reward_model(backbone=backbone))
    if backbone:
        roles["guide0_backbone"] = b.backbone(backbone)
    return Recipe("args", roles, {"weight": weight, "k": 10, "greedy": greedy})


def _tuned(b: Builder, method: str, lora: bool) -> Recipe:
    return Recipe("plain", b.roles(b.train(method, lora=lora, full=not lora)))


def _rloo(b: Builder) -> Recipe:
    needs = {"reward_model": b.reward_model()}
    settings = {"generations": 4, "new_tokens": b.scale.rl_tokens}
    return Recipe("plain", b.roles(b.train("rloo", full=True, needs=needs, **settings)))


def _best_of_n(b: Builder) -> Recipe:
    return Recipe("best_of_n", b.roles(None, b.reward_model()), {"n": b.scale.best_of})


def _weak_to_strong(b: Builder) -> Recipe:
    weak = b.dual_head(backbone="weak")
    roles = b.roles(None, weak) | {"guide0_backbone": b.backbone("weak")}
    return Recipe("weak_to_strong", roles)


@dataclass(frozen=True)
class System:
    """A system that is compared.

    Attributes:
        label: name in tables.
        build: function that makes its recipe.
        needs_trl: whether its training needs TRL.
    """

    label: str
    build: Callable[[Builder], Recipe]
    needs_trl: bool = False


def _gated(label: str, variant: str) -> System:
    return System(label, partial(_dual_head, variant=variant))


SYSTEMS: dict[str, System] = {
    "backbone": System("backbone", _backbone),
    "dual_head": _gated("Dual-Head (logits mix)", "dual_head"),
    "probs_mix": _gated("Dual-Head (probability mix)", "probs_mix"),
    "fixed_gate": _gated("fixed gate, alpha 0.5", "fixed_gate"),
    "merged": System("fixed gate, merged into one head", _merged),
    "linear_gate": _gated("linear gate", "linear_gate"),
    "no_regularizer": _gated("no regulariser", "no_regularizer"),
    "printed_sign": _gated("regulariser's sign as printed", "printed_sign"),
    "pref_on_mixed": _gated("preference loss on the mixture", "pref_on_mixed"),
    "single_head_equal_parameters": _gated(
        "one attention head, equal parameters", "single_head_equal_parameters"
    ),
    "single_head_equal_size": _gated("one attention head, equal size", "single_head_equal_size"),
    "lm_sum": _gated("LM loss summed, as printed", "lm_sum"),
    "pref_mean": _gated("preference loss per token", "pref_mean"),
    "pref_mean_on_mixed": _gated("preference loss per token, on the mixture", "pref_mean_on_mixed"),
    "genarm_lora": System("GenARM (LoRA)", partial(_genarm, lora=True), True),
    "genarm_full": System("GenARM (full copy)", partial(_genarm, lora=False), True),
    "args_1.0": System("ARGS, w = 1", partial(_args, weight=1.0), True),
    "args_1.5": System("ARGS, w = 1.5", partial(_args, weight=1.5), True),
    "args_stochastic": System(
        "ARGS, w = 1, sampled", partial(_args, weight=1.0, greedy=False), True
    ),
    "args_weak": System(
        "ARGS, w = 1, smaller reward model", partial(_args, weight=1.0, backbone="weak"), True
    ),
    "dpo_lora": System("DPO (LoRA)", partial(_tuned, method="dpo", lora=True), True),
    "dpo_full": System("DPO (full)", partial(_tuned, method="dpo", lora=False), True),
    "simpo_lora": System("SimPO (LoRA)", partial(_tuned, method="simpo", lora=True), True),
    "simpo_full": System("SimPO (full)", partial(_tuned, method="simpo", lora=False), True),
    "rloo": System("RLHF (RLOO)", _rloo, True),
    "best_of_n": System("best of n", _best_of_n, True),
    "weak_to_strong": System("Dual-Head of the small backbone", _weak_to_strong),
}
# Systems that also run on the backbone of the other architecture, and with every seed.
HEADLINE = ("backbone", "dual_head", "linear_gate", "fixed_gate", "genarm_lora", "dpo_lora")
# Systems in the table of gates.
GATED = (
    "dual_head",
    "probs_mix",
    "linear_gate",
    "no_regularizer",
    "printed_sign",
    "pref_on_mixed",
    "single_head_equal_parameters",
    "single_head_equal_size",
    "lm_sum",
    "pref_mean",
    "pref_mean_on_mixed",
)
ABLATIONS = ("backbone", "dual_head", "fixed_gate", *GATED[1:])
# Systems that are timed; every other system decodes like one of these.
TIMED = (
    "backbone",
    "dual_head",
    "linear_gate",
    "fixed_gate",
    "merged",
    "genarm_lora",
    "args_1.0",
    "best_of_n",
    "dpo_full",
    "weak_to_strong",
)
# Systems without a distribution over the next token.
SEARCHES = ("args_1.0", "args_1.5", "args_stochastic", "args_weak", "best_of_n")
# Systems that answer the questions of TruthfulQA and MT-Bench.
BENCHMARKED = ("backbone", "dual_head", "linear_gate", "genarm_lora", "dpo_lora")
WEAK_TO_STRONG = ("backbone", "weak_to_strong", "dual_head", "dpo_lora")
