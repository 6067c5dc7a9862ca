# SPDX-License-Identifier: Apache-2.0
"""alpha of each token for requests with ``return_alpha``: stored by the model in each worker and
read through vLLM's ``collective_rpc``.
"""

from __future__ import annotations

from typing import Any

METHOD = "take_dual_head_alpha"


class AlphaOfWorker:
    """Methods that vLLM adds to its worker class (``worker_extension_cls``)."""

    def take_dual_head_alpha(self, name: str) -> list[float] | None:
        """Return and delete alpha of the request with this name. It may contain one more number
        than the request has tokens, from a step that was running when the request ended.
        """
        worker: Any = self
        return worker.get_model().requests.take_alpha(name)


def take_alpha(llm: Any, output: Any, name: str) -> list[float]:
    """alpha of each token of a text, including the end token.

    Args:
        llm: a ``vllm.LLM``.
        output: its ``RequestOutput``.
        name: the request's name, set by ``SamplingParams(extra_args={"return_alpha": name})``.
    Raises:
        KeyError: there is no such request, or its alpha was already taken.
    """
    found = llm.collective_rpc(METHOD, args=(name,))[0]  # every worker has the same
    if found is None:
        raise KeyError(f"take_alpha: no request of the name {name!r}")
    return found[: len(output.outputs[0].token_ids)]
