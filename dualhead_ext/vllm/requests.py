# SPDX-License-Identifier: Apache-2.0
"""The controls of a request: ``SamplingParams.extra_args``, over HTTP ``vllm_xargs``, checked by
the same code as the controls of ``generate()``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..head.controls import Controls

WHERE = "vllm_xargs"
RETURN_ALPHA = "return_alpha"
# Names that vLLM itself stores among the extra arguments of a request.
_OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "session_id")
_KNOWN = (*Controls.NAMES, RETURN_ALPHA)


def controls_of(extra_args: Mapping[str, Any] | None, num_objectives: int) -> dict[str, Any]:
    """The controls among a request's extra arguments: {name: number}, objective_weights: K numbers.

    Raises:
        ValueError: an unknown name, a wrong type or a value out of range.
    """
    given = {n: v for n, v in (extra_args or {}).items() if n not in (*_OF_VLLM, RETURN_ALPHA)}
    for name, value in given.items():
        if name not in Controls.NAMES:
            near = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{WHERE}: expected {', '.join(_KNOWN)}, got {name}{hint}")
        if isinstance(value, (list, tuple)) and name in Controls.LIMITS:
            expected = Controls.LIMITS[name].expected
            raise ValueError(f"{WHERE}: {name} must be {expected}, got {value!r}")
    if not given:
        return {}
    from ..head.request_controls import numbers_of_requests

    try:
        return numbers_of_requests(WHERE, Controls(**given), 1, num_objectives)[0]
    except TypeError as error:  # vLLM would treat it as a server error
        raise ValueError(str(error)) from error


def alpha_name_of(extra_args: Mapping[str, Any] | None, n: int = 1) -> str | None:
    """The name under which alpha of a request is stored, or None if it is not requested. n: number
    of texts of the request.

    Raises:
        ValueError: not a name, or more than one text would share it.
    """
    name = (extra_args or {}).get(RETURN_ALPHA)
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{WHERE}: {RETURN_ALPHA} must be a name of your own for the request, a string, got "
            f"{name!r}; over HTTP, true needs the server of `dualhead serve`"
        )
    if n > 1:
        raise ValueError(f"{WHERE}: {RETURN_ALPHA} needs n = 1, got {n}")
    return name


def by_objectives(base: type) -> Callable[[str], type]:
    """A module's ``__getattr__`` for classes ``{base.__name__}K`` of K objectives. vLLM refers to a
    class by its import path and passes it nothing else when it checks a request.
    """

    @functools.cache
    def find(name: str) -> type:
        count = name.removeprefix(base.__name__)
        if count == name or not count.isdigit():
            raise AttributeError(f"module {base.__module__} has no attribute {name}")
        return type(name, (base,), {"num_objectives": int(count)})

    return find
