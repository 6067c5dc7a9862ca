# SPDX-License-Identifier: Apache-2.0
"""alpha of each token of a request that asked for it (``return_alpha``): kept by the model in each
worker, taken through vLLM's ``collective_rpc``.
"""

from __future__ import annotations

from typing import Any

METHOD = "take_dual_head_alpha"


class AlphaOfWorker:
    """What vLLM adds to its worker class (``worker_extension_cls``)."""

    def take_dual_head_alpha(self, name: str) -> list[float] | None:
        """alpha of the request that asked for it under this name, and forget it. It may hold one
        more number than the request has tokens: a step that was under way when it ended.
        """
        worker: Any = self
        return worker.get_model().requests.take_alpha(name)


def take_alpha(llm: Any, output: Any, name: str) -> list[float]:
    """alpha of each token of a text, the one that ends it included.

    Args:
        llm: a ``vllm.LLM``. output: its ``RequestOutput``.
        name: the request's own, given as ``SamplingParams(extra_args={"return_alpha": name})``.
    Raises:
        KeyError: no such request, or its alpha has been taken.
    """
    found = llm.collective_rpc(METHOD, args=(name,))[0]  # every worker has the same
    if found is None:
        raise KeyError(f"take_alpha: no request of the name {name!r}")
    return found[: len(output.outputs[0].token_ids)]
