# SPDX-License-Identifier: Apache-2.0
"""The requests of a batch: their controls as rows of a table on the device, and alpha if requested.

A model's forward gets all positions, and `compute_logits` a selection of them. So each position
gets its request's row, as additional columns of the hidden states.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..head.controls import Controls
from ..head.request_controls import neutral_numbers

# Maximum number of requests whose alpha is kept until it is taken; the oldest are dropped first.
_KEPT = 4096


@dataclass
class Request:
    """A request that sets controls or asks for alpha.

    Attributes:
        controls: as :func:`.requests.controls_of` returns them.
        alpha_name: as :func:`.requests.alpha_name_of` returns it.
        output: the tokens generated so far; vLLM extends the list.
    """

    controls: dict[str, Any]
    alpha_name: str | None = None
    output: Sequence[int] = ()


class RequestTable:
    """The controls of up to ``max_requests`` requests, with neutral values for those not set.

    Attributes:
        width: number of values in a row.
    """

    _tables: ClassVar[weakref.WeakValueDictionary[int, RequestTable]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, max_requests: int, num_objectives: int, device: torch.device) -> None:
        neutral = neutral_numbers(num_objectives)
        self._scalars = tuple(Controls.LIMITS)
        self._neutral = [neutral[name] for name in self._scalars] + neutral["objective_weights"]
        self.width = len(self._neutral)
        self._requests: dict[int, Request] = {}
        self._host = torch.tensor(self._neutral).repeat(max_requests, 1)
        self._device = self._host.to(device)
        self._neutral_row = torch.tensor(self._neutral, device=device)
        self._used: set[str] = set()
        self._asking: list[tuple[int, str, int]] = []
        self._alphas: OrderedDict[str, dict[int, float]] = OrderedDict()

    @classmethod
    def of(cls, vllm_config: Any, num_objectives: int, device: torch.device) -> RequestTable:
        """The table of an engine, shared by its model and its model runner."""
        table = cls._tables.get(id(vllm_config))
        if table is None:
            count = vllm_config.scheduler_config.max_num_seqs
            table = cls._tables[id(vllm_config)] = cls(count, num_objectives, device)
            table._owner = vllm_config  # while the table lives, no other object has this id
        return table

    # --- what the model runner says ---

    def replace(self, requests: dict[int, Request]) -> None:
        """Replace the whole table: row -> request that sets something."""
        self._write((self._requests.keys() | requests.keys()), requests)

    def put(self, row: int, request: Request | None) -> None:
        """Set one row; None for a request that sets nothing, or for an empty row."""
        requests = {i: r for i, r in self._requests.items() if i != row}
        self._write([row], requests if request is None else requests | {row: request})

    def _write(self, rows: Any, requests: dict[int, Request]) -> None:
        self._requests = dict(requests)
        self._used = {name for request in requests.values() for name in request.controls}
        for row in rows:
            found = requests[row].controls if row in requests else {}
            numbers = list(self._neutral)
            for i, name in enumerate(self._scalars):
                numbers[i] = found.get(name, numbers[i])
            if "objective_weights" in found:
                numbers[len(self._scalars) :] = found["objective_weights"]
            self._host[row] = torch.tensor(numbers)
        if self._device is not self._host and rows:
            self._device.copy_(self._host)

    def at(self, row: int) -> Request | None:
        """The request of a row, if it sets something."""
        return self._requests.get(row)

    def expect(self, rows: list[tuple[int, str, int]]) -> None:
        """Set which rows of the next logits belong to requests that ask for alpha: (row, name,
        index of the token that the logits predict). A later alpha of the same
        token replaces the earlier.
        """
        self._asking = rows

    # --- what the model asks ---

    def of_positions(
        self, query_start_loc: Tensor | None, count: int, rows: Tensor | None = None
    ) -> Tensor:
        """The row of each of ``count`` positions, (count, width), where request i has those from
        ``query_start_loc[i]`` on; None: no request is there. Positions beyond are padding.
        rows: the row of request i; default i.
        """
        plain = not self._used and self._device.device.type == "cpu"
        if query_start_loc is None or plain:  # a CUDA graph may be captured now: always the same
            return self._neutral_row.expand(count, -1)
        positions = torch.arange(count, device=query_start_loc.device)
        found = torch.searchsorted(query_start_loc[1:].long(), positions, right=True)
        found = found.clamp(max=len(query_start_loc) - 2)
        return self._device[found if rows is None else rows[found]]

    def controls(self, rows: Tensor) -> Controls:
        """Rows (N, width) as controls; only controls that some request in the batch sets."""
        found = {n: rows[:, i] for i, n in enumerate(self._scalars) if n in self._used}
        if "objective_weights" in self._used:
            found["objective_weights"] = rows[:, len(self._scalars) :]
        return Controls(**found)

    def note(self, alpha: Tensor) -> None:
        """Store alpha (N,) of the logits announced by :meth:`expect`."""
        asking, self._asking = self._asking, []
        if not asking or asking[-1][0] >= len(alpha):
            return
        for row, name, index in asking:
            self._alphas.setdefault(name, {})[index] = float(alpha[row])
            self._alphas.move_to_end(name)
        while len(self._alphas) > _KEPT:
            self._alphas.popitem(last=False)

    def take_alpha(self, name: str) -> list[float] | None:
        """Return and delete alpha of each token of a request; None if the request is unknown."""
        found = self._alphas.pop(name, None)
        return None if found is None else [found[i] for i in sorted(found)]
