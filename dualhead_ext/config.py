# SPDX-License-Identifier: Apache-2.0
"""The configuration of a dual head: sizes, gate, mixture. Plain data; imports Python only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

GATE_NAMES = ["attention", "fixed", "linear"]  # `head.gate.register_gate` appends to it
MIX_NAMES = ("logits", "probs")
REWARD_HEAD_NAMES = ("full", "embedding", "lowrank")
PREFERENCE_NAMES = ("log_prob", "token_reward")
FORMAT_NAMES = ("int8", "fp8", "int4")  # formats of quantised heads: `quantization.FORMATS`
MODEL_TYPE = "dualhead"  # in the config.json of a folder of heads
# The head of the default preset and of `from_backbone`. docs/results.md says why.
DEFAULT_HEAD: dict[str, Any] = {"reward_head": "embedding", "reward_rank": 0, "gate": "fixed"}


def head_fields(given: dict[str, Any], defaults: dict[str, Any] = DEFAULT_HEAD) -> dict[str, Any]:
    """Fields of :class:`DualHeadConfig`: ``given`` overrides ``defaults``. Another kind of reward
    head also drops the default rank.
    """
    kept = dict(defaults)
    if given.get("reward_head", kept["reward_head"]) != kept["reward_head"]:
        kept.pop("reward_rank", None)
    return kept | given


@dataclass
class DualHeadConfig:
    """Sizes and choices of a dual head.

    Args:
        hidden_size: d, the backbone's hidden size.
        vocab_size: V, rows of the LM head.
        gate: ``"attention"`` (default: causal multi-head attention over the hidden states),
            ``"fixed"`` (alpha = ``gate_alpha`` everywhere), ``"linear"`` (sigmoid(w.h + b), no
            attention), or a name given to :func:`dualhead_ext.head.gate.register_gate`.
        gate_num_heads: H. Default 8.
        gate_head_dim: d_k. Default 48, so that g = H * d_k = 384: 4.87M gate parameters at d =
            4096.
        gate_alpha: the constant of ``gate="fixed"``, in [0, 1]. Default 0.5. Unused otherwise.
        mix: ``"logits"`` (default): z = (1-a) z_LM + a z_RM. ``"probs"``: pi = (1-a) softmax(z_LM)
            + a softmax(z_RM).
        num_objectives: K, the number of reward heads. Default 1.
        reward_head: ``"full"`` (default): z_RM = W_RM h, a matrix of the LM head's size. Or a
            correction of the LM head, z_RM = z_LM + delta: ``"embedding"``, delta = W_LM (U D h +
            c), or ``"lowrank"``, delta = B A h + b.
        reward_rank: r, the inner width of a correction. Default 16. With 0 (``"embedding"`` only)
            delta is W_LM c. Unused by ``"full"``.
        preference: the objective that the reward was trained with, a name in `PREFERENCE_NAMES`.
            Default ``"log_prob"``. Evaluation reads it; decoding does not depend on it.
        kl_curve: points (strength, KL from the backbone in nats per token) that calibration
            measured, in rising order from (0, 0). Default None.
        bias: whether both heads have a bias. Default False; ``from_lm_head`` reads it from the LM
            head.
        logit_scale: first half of the backbone's post-processing f(z) = cap(logit_scale * z).
            Default 1.
        logit_softcap: second half, cap(z) = c tanh(z / c). Default 0: no cap.

    Raises:
        ValueError: a value out of range, or not one of the names.
        TypeError: a size that is not an int, a number of another type, or a bias that is no bool.
    """

    hidden_size: int
    vocab_size: int
    gate: str = "attention"
    gate_num_heads: int = 8
    gate_head_dim: int = 48
    gate_alpha: float = 0.5
    mix: str = "logits"
    num_objectives: int = 1
    reward_head: str = "full"
    reward_rank: int = 16
    preference: str = "log_prob"
    kl_curve: list[list[float]] | None = None
    bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "vocab_size", "gate_num_heads", "gate_head_dim", "num_objectives")
        for name in (*sizes, "reward_rank"):
            value = getattr(self, name)
            lowest = 0 if name == "reward_rank" else 1
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"DualHeadConfig: {name} must be an int, got {value!r}")
            if value < lowest:
                raise ValueError(f"DualHeadConfig: {name} must be at least {lowest}, got {value}")
        choices = (
            ("gate", GATE_NAMES),
            ("mix", MIX_NAMES),
            ("reward_head", REWARD_HEAD_NAMES),
            ("preference", PREFERENCE_NAMES),
        )
        for name, names in choices:
            if getattr(self, name) not in names:
                raise ValueError(
                    f"DualHeadConfig: {name} must be one of {', '.join(names)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.reward_head == "lowrank" and self.reward_rank == 0:
            raise ValueError(
                'DualHeadConfig: reward_rank must be at least 1 for reward_head="lowrank", got 0'
            )
        for name in ("gate_alpha", "logit_scale", "logit_softcap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"DualHeadConfig: {name} must be a number, got {value!r}")
            if not is_finite(value):
                raise ValueError(f"DualHeadConfig: {name} must be finite, got {value}")
        if not 0.0 <= self.gate_alpha <= 1.0:
            raise ValueError(f"DualHeadConfig: gate_alpha must be in [0, 1], got {self.gate_alpha}")
        if self.logit_softcap < 0.0:
            raise ValueError(
                f"DualHeadConfig: logit_softcap must be >= 0, got {self.logit_softcap}"
            )
        if self.logit_scale == 0.0:
            raise ValueError("DualHeadConfig: logit_scale must not be 0")
        if self.kl_curve is not None and not _is_curve(self.kl_curve):
            raise ValueError(
                "DualHeadConfig: kl_curve must be pairs (strength, KL) of finite numbers that rise "
                f"from (0, 0), got {self.kl_curve!r}"
            )
        if not isinstance(self.bias, bool):
            raise TypeError(f"DualHeadConfig: bias must be a bool, got {self.bias!r}")

    @property
    def gate_size(self) -> int:
        """g = H * d_k, the inner width of the attention gate."""
        return self.gate_num_heads * self.gate_head_dim

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DualHeadConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown or missing keys; the message names them. Unknown keys are refused
                because a file of a newer format must not be read in part.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(
                f"DualHeadConfig: unknown keys {', '.join(unknown)}; "
                f"known are {', '.join(sorted(names))}"
            )
        missing = sorted({"hidden_size", "vocab_size"} - set(values))
        if missing:
            raise ValueError(f"DualHeadConfig: missing keys {', '.join(missing)}")
        return cls(**values)


def is_finite(value: float) -> bool:
    """``math.isfinite``, and False for an integer that is too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_curve(curve: Any) -> bool:
    """Whether ``curve`` is a list of points [strength, KL] that rise from [0, 0]. It may come from
    a file, so it may be anything.
    """
    if not isinstance(curve, list) or len(curve) < 2 or curve[0] != [0.0, 0.0]:
        return False
    for point in curve:
        if not isinstance(point, list) or len(point) != 2:
            return False
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in point):
            return False
        if not all(map(is_finite, point)):
            return False
    return all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(curve))
