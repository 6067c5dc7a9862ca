# SPDX-License-Identifier: Apache-2.0
"""Controls of requests in a batch whose members change. Each request may set different controls,
which are stored as plain numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .controls import Controls
from .mixture import mixing_weight


def numbers_of_requests(
    operator: str, controls: Controls, count: int, num_objectives: int
) -> list[dict[str, Any]]:
    """The controls of each of ``count`` requests: {control: number}, objective_weights: K numbers.

    Raises:
        TypeError, ValueError: as :meth:`Controls.rows`.
    """
    where = (count, num_objectives, torch.float64, torch.device("cpu"))
    given = controls.rows(operator, *where).given()
    return [{name: rows[i].tolist() for name, rows in given.items()} for i in range(count)]


def neutral_numbers(num_objectives: int) -> dict[str, Any]:
    """The neutral value of each control; for alpha NaN, see :func:`with_own_alpha`."""
    neutral: dict[str, Any] = {name: limits.neutral for name, limits in Controls.LIMITS.items()}
    return neutral | {"objective_weights": [1.0 / num_objectives] * num_objectives}


def rows_of_requests(given: list[dict[str, Any]], num_objectives: int) -> Controls:
    """Rows of all controls that any request sets, with neutral values for the other requests."""
    neutral = neutral_numbers(num_objectives)
    names = [name for name in Controls.NAMES if any(name in request for request in given)]
    return Controls(
        **{n: torch.tensor([request.get(n, neutral[n]) for request in given]) for n in names}
    )


def with_own_alpha(controls: Controls, gate_logit: Tensor) -> Controls:
    """Replace NaN in ``alpha`` by the gate's own alpha, from gate_logit (B, 1)."""
    found = controls.given()
    if (alpha := found.get("alpha")) is None:
        return controls
    _, own = mixing_weight(gate_logit, Controls(gate_offset=found.get("gate_offset")))
    found["alpha"] = torch.where(alpha.isnan(), own[:, 0].to(alpha.dtype), alpha)
    return Controls(**found)
