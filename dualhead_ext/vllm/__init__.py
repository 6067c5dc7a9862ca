# SPDX-License-Identifier: Apache-2.0
"""The gated head in vLLM: a plugin, which vLLM finds by the entry point ``vllm.general_plugins``.

It registers one gated model for each architecture of
:data:`dualhead_ext.model.served_folder.ARCHITECTURES`. vLLM's own scheduler, paged cache and
backbones do the rest. vLLM is imported by vLLM alone: nothing here needs it to be installed.

- `models`: the gated models; `head`: gate and heads from vLLM's layers; `gate_cache`: the gate's
  keys and values as one more attention layer.
- `requests`: what a request may set, checked; `request_table`: the requests of a batch on the
  device; `controls_v1` and `controls_v2` fill it from vLLM's two model runners.
- `alpha`: alpha per token in the answer; `server`: the OpenAI-compatible server.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the gated models. It calls this in each of its processes."""
    from .plugin import register_models

    register_models()
